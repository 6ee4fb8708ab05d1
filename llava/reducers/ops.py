"""The tensor operations reducers are made of: batched over images, scores in float32, no loop over tokens.

B images, N patches, C channels, K kept rows. Where a choice of tokens hangs on a number, the number comes
from operations that treat every row alone (multiply, sum, softmax, sort), never from a matrix product: the
kernels of those differ with the batch size, and a last bit would then decide which patch is kept.
"""

import functools
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.registry import ReducerInputError

NEIGHBOURS = 32
"""How many patches PruMerge merges into each that it keeps, as released."""


@functools.cache
def _compiled() -> ModuleType | None:
    """`compiled`, or None where numba does not load (it is particular about numpy's version)."""
    try:
        from llava.reducers import compiled  # here: half a second that GPUs need not wait
    except ImportError:
        return None
    return compiled


def compiled_for(*tensors: Tensor | None) -> ModuleType | None:
    """The loops of `compiled` where they do the work: on a CPU, where nothing is to be differentiated."""
    for tensor in tensors:
        if tensor is not None and (
            tensor.device.type != "cpu" or (tensor.requires_grad and torch.is_grad_enabled())
        ):
            return None
    return _compiled()


def images_at_a_time(each: int, device: torch.device) -> int:
    """How many images to work on at once where each needs so many float32 of room.

    One at least, else what fits 1 MiB, so into a CPU's cache; 256 MiB elsewhere, where many small operations
    cost more than a large one.
    """
    return max(1, (1 << 18 if device.type == "cpu" else 1 << 26) // max(1, each))


def cls_attention(features: VisionFeatures) -> Tensor:
    """PruMerge's attention of the CLS row: softmax(q_cls . k_j / sqrt(C)) over all N + 1 rows, CLS dropped.

    One head of C channels, not the tower's heads (facts of the released code, 42Shawn/LLaVA-PruMerge), so a
    row sums to less than 1; it is not renormalised.

    Returns:
        [B, N] float32, the same bits for an image whatever batch it comes in.

    Raises:
        ReducerInputError: the tower has no CLS token.
    """
    return cls_attention_and_norms(features)[0]


def cls_attention_and_norms(features: VisionFeatures) -> tuple[Tensor, Tensor]:
    """`cls_attention`, and the norms of all keys, CLS first: [B, N] and [B, N + 1] float32."""
    features = features.float()
    kernels = compiled_for(features.key, features.query)
    if kernels is None or features.query is None:
        attention = _attention_scores(features, heads=1).squeeze(1)
        return attention[:, 1:], torch.linalg.vector_norm(features.key, dim=2)
    return kernels.attention_and_norms(features.query, features.key)


def cls_attention_per_head(features: VisionFeatures) -> Tensor:
    """The tower's own attention of the CLS row: softmax(q_h . k_h / sqrt(C / heads)), CLS dropped.

    Returns:
        [B, heads, N] float32, the same bits for an image whatever batch it comes in.

    Raises:
        ReducerInputError: the tower has no CLS token.
    """
    return _attention_scores(features, heads=features.num_heads)[..., 1:]


def _attention_scores(features: VisionFeatures, heads: int) -> Tensor:
    """[B, heads, N + 1] softmax of the CLS query against all keys, CLS column first."""
    if features.query is None:
        raise ReducerInputError(
            "this method reads the attention of the CLS token, and this vision tower has none: "
            "use pool, grid or random with it"
        )
    _, rows, width = features.key.shape
    chunk = images_at_a_time(rows * width, features.key.device)
    scaled = features.query.float() * (width // heads) ** -0.5
    logits = [
        (key.float() * query.unsqueeze(1)).view(-1, heads, width // heads).sum(2)
        for key, query in zip(features.key.split(chunk), scaled.split(chunk), strict=True)
    ]
    return (
        (logits[0] if len(logits) == 1 else torch.cat(logits))
        .view(-1, rows, heads)
        .softmax(1)
        .transpose(1, 2)
    )


def require_finite(finite: list[bool]) -> None:
    """Raises ReducerInputError, naming the images, unless every image of a batch is finite."""
    if not all(finite):
        bad = ", ".join(str(image) for image, good in enumerate(finite) if not good)
        raise ReducerInputError(
            f"the vision features of image {bad} of the batch (counted from 0) hold NaN or infinite values"
        )


def outlier_fence(descending: Tensor) -> Tensor:
    """Tukey's upper fence, Q3 + 1.5 (Q3 - Q1), quartiles by linear interpolation.

    Args:
        descending: [..., N] values sorted from the largest to the smallest.

    Returns:
        [...] the fence; outliers lie strictly above it.
    """
    return torch.lerp(_quantile(descending, 0.25), _quantile(descending, 0.75), 2.5)


def outlier_count(descending: Tensor) -> Tensor:
    """How many values lie strictly above their `outlier_fence`: [B, N] float32 sorted -> [B] int64."""
    kernels = compiled_for(descending)
    if kernels is not None:
        return kernels.outlier_count(descending)
    return (descending > outlier_fence(descending).unsqueeze(-1)).sum(-1)


def _quantile(descending: Tensor, q: float) -> Tensor:
    """As torch.quantile(..., interpolation="linear"), on values that are sorted already."""
    last = descending.shape[-1] - 1
    position = q * last
    below = int(position)
    lower, upper = descending[..., last - below], descending[..., max(last - below - 1, 0)]
    return torch.lerp(lower, upper, position - below)


def comb(count: Tensor, length: int) -> Tensor:
    """PruMerge+'s spatial samples: every s-th patch in raster order, s = (N // count) // 3, at least 1.

    About three samples for each outlier. The last patch is never one, as in the released code, whose comb
    ends at 575 of 576. No outlier, no comb.

    Args:
        count: [B] int64, outliers of each image.
        length: N.

    Returns:
        [B, N] bool.
    """
    stride = (length // count.clamp(min=1) // 3).clamp(min=1).unsqueeze(-1)
    index = torch.arange(length, device=count.device)
    return (index % stride == 0) & (index < length - 1) & (count > 0).unsqueeze(-1)


def stepped_comb(like: Tensor, step: int) -> Tensor:
    """The spatial samples of the released training code: patches step // 2, + step, + 2 step ... below N - 1.

    Returns:
        [B, N] bool for `like` [B, N], the same for every image.
    """
    index = torch.arange(like.shape[1], device=like.device) - step // 2
    return ((index >= 0) & (index % step == 0) & (index < like.shape[1] - 1 - step // 2)).expand_as(like)


def even_comb(like: Tensor, number: int) -> Tensor:
    """So many patches at even distances in raster order, at the middle of each stretch.

    Returns:
        [B, N] bool for `like` [B, N], the same for every image.
    """
    length = like.shape[1]
    teeth = (torch.arange(number, device=like.device) * 2 + 1) * length // max(1, 2 * number)
    return (
        torch.zeros(length, dtype=torch.bool, device=like.device).index_fill_(0, teeth, True).expand_as(like)
    )


def inverse(order: Tensor) -> Tensor:
    """The rank of each patch in `order`: the inverse of permutations [B, N] int64."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def pick(patches: Tensor, index: Tensor) -> ReducedTokens:
    """The patches [B, N, C] at index [B, K] int64 as they are, in that order; the others go nowhere."""
    batch, length, width = patches.shape
    count = index.shape[1]
    row = torch.arange(count, device=index.device).expand(batch, -1)
    return ReducedTokens(
        tokens=patches.gather(1, index.unsqueeze(-1).expand(-1, -1, width)),
        lengths=index.new_full((batch,), count),
        kept=index,
        source=index.new_full((batch, length), -1).scatter_(1, index, row),
    )


def merge_nearest(
    patches: Tensor,
    key: Tensor,
    norm: Tensor,
    weight: Tensor,
    kept: Tensor,
    is_real: Tensor | None,
    neighbours: int = NEIGHBOURS,
) -> tuple[Tensor, Tensor]:
    """Adds to each kept patch its nearest patches, weighted: out_i = f_i + sum over neighbours of w_j f_j.

    Neighbours are the `neighbours` other patches (kept or not) whose keys have the largest cosine similarity
    with the kept patch's key. Weights are not normalised and the centre has weight 1, as released.

    The one large product is that of the K kept keys with all N. Only indices are taken from it; the merge
    then reads the 33 patches of each row (`embedding_bag`), which costs less than a second product. Extra
    memory: K (2 N + C) float32 an image, for `images_at_a_time`, and B K 33 indices and weights.

    Args:
        patches: [B, N, C] float32.
        key: [B, N + 1, C] float32, CLS first.
        norm: [B, N + 1] float32, the norm of each key.
        weight: [B, N] float32.
        kept: [B, K] int64, patches; the rows of an image all different.
        is_real: [B, K] bool, false for padding rows, which repeat the image's first row; None: no padding.
        neighbours: how many, at most N - 1.

    Returns:
        [B, K + 1, C] float32, zeros in padding rows and in the last; and [B, N] int64: the row whose key each
        patch's key is most similar to. Differentiable in patches and weight.
    """
    batch, length, width = patches.shape
    count, device = kept.shape[1], kept.device
    if count == 0:
        return patches.new_zeros(batch, 1, width), kept.new_zeros(batch, length)
    first = torch.arange(0, batch * length, length, device=device).view(-1, 1)  # of each image, flat
    inverse_norm = norm[:, 1:].clamp(min=1e-12).reciprocal()
    chunk = images_at_a_time(count * length, device)
    images = zip(key.split(chunk), inverse_norm.split(chunk), kept.split(chunk), strict=True)
    parts = [_nearest(*image, min(neighbours + 1, length)) for image in images]
    near, nearest = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    index = (near + first.unsqueeze(2)).flatten()
    share = weight.flatten().index_select(0, index).view_as(near).masked_fill(near == kept.unsqueeze(2), 1)
    if is_real is not None:
        share = share * is_real.unsqueeze(2)
    # One bag a row; and at each image's end an empty one, which gives zeros.
    size = near.shape[2]
    start = torch.arange(0, batch * count * size, count * size, device=device).view(-1, 1)
    offsets = (start + torch.arange(0, (count + 1) * size, size, device=device)).flatten()
    merged = F.embedding_bag(
        index, patches.flatten(0, 1), offsets, per_sample_weights=share.flatten(), mode="sum"
    )
    return merged.view(batch, count + 1, width), nearest


@torch.no_grad()
def _nearest(key: Tensor, inverse_norm: Tensor, kept: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Cosine similarities of the kept keys with all keys, and what is nearest to what.

    Args:
        key: [B, N + 1, C] float32, CLS first.
        inverse_norm: [B, N], of the keys without CLS.
        kept: [B, K] int64, patches.
        number: of patches to find for each kept one, itself included.

    Returns:
        [B, K, number] int64, the patches nearest to each row, in no order; [B, N] int64, the row nearest to
        each patch.
    """
    batch, total, width = key.shape
    # Kernels of a product differ with its size, in the last bit of the result. Whole blocks of 16 rows keep
    # an image's similarities the same (seen, not promised) whatever the number of rows its batch needs.
    rows = F.pad(kept, (0, -kept.shape[1] % 16))
    first = torch.arange(1, batch * total, total, device=key.device).view(-1, 1)
    own = key.flatten(0, 1).index_select(0, (rows + first).flatten()).view(batch, -1, width)
    own.mul_(inverse_norm.gather(1, rows).unsqueeze(2))
    by_patch = torch.bmm(key[:, 1:], own.transpose(1, 2))[:, :, : kept.shape[1]]
    by_row = by_patch.transpose(1, 2).contiguous().mul_(inverse_norm.unsqueeze(1))
    by_row.scatter_(2, kept.unsqueeze(2), torch.inf)  # a row itself comes first, whatever rounding says
    return by_row.topk(number, sorted=False).indices, by_patch.max(2).indices
