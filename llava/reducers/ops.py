"""The tensor operations reducers are made of: batched over images, scores in float32, no loop over tokens.

B images, N patches, C channels, K kept rows. Where a choice of tokens hangs on a number, the number comes
from operations that treat every row alone (multiply, sum, softmax, sort), never from a matrix product: the
kernels of those differ with the batch size, and a last bit would then decide which patch is kept.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers.features import VisionFeatures
from llava.reducers.registry import ReducerInputError

WORKSPACE = 1 << 24
"""Elements of the largest temporary an operation here makes before it works in chunks: 64 MiB in float32."""


def cls_attention(features: VisionFeatures) -> Tensor:
    """PruMerge's attention of the CLS row: softmax(q_cls . k_j / sqrt(C)) over all N + 1 rows, CLS dropped.

    One head of C channels, not the tower's heads (facts of the released code, 42Shawn/LLaVA-PruMerge), so a
    row sums to less than 1; it is not renormalised.

    Returns:
        [B, N] float32, the same bits for an image whatever batch it comes in.

    Raises:
        ReducerInputError: the tower has no CLS token.
    """
    return _attention_scores(features, heads=1).squeeze(1)[:, 1:]


def cls_attention_per_head(features: VisionFeatures) -> Tensor:
    """The tower's own attention of the CLS row, head by head: softmax(q_h . k_h / sqrt(C / heads)), CLS dropped.

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
    chunk = max(1, WORKSPACE // (rows * width))
    logits = torch.cat(
        [
            (key.float() * query.float().unsqueeze(1)).unflatten(2, (heads, width // heads)).sum(3)
            for key, query in zip(features.key.split(chunk), features.query.split(chunk), strict=True)
        ]
    )
    return (logits * (width // heads) ** -0.5).softmax(1).transpose(1, 2)


def outlier_fence(descending: Tensor) -> Tensor:
    """Tukey's upper fence, Q3 + 1.5 (Q3 - Q1), quartiles by linear interpolation.

    Args:
        descending: [..., N] values sorted from the largest to the smallest.

    Returns:
        [...] the fence; outliers lie strictly above it.
    """
    q1, q3 = _quantile(descending, 0.25), _quantile(descending, 0.75)
    return q3 + 1.5 * (q3 - q1)


def outlier_count(descending: Tensor) -> Tensor:
    """How many values lie strictly above their `outlier_fence`: [..., N] sorted -> [...] int64."""
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


def merge_nearest(
    patches: Tensor, key: Tensor, weight: Tensor, kept: Tensor, neighbours: int = 32
) -> tuple[Tensor, Tensor]:
    """Adds to each kept patch its nearest patches, weighted: out_i = f_i + sum over neighbours of w_j f_j.

    Neighbours are the `neighbours` other patches (kept or not) whose keys have the largest cosine similarity
    with the kept patch's key. Weights are not normalised and the centre has weight 1, as released.

    The extra memory at its peak is `WORKSPACE` elements of similarities, or B N where that is more: kept rows
    are worked off in chunks.

    Args:
        patches: [B, N, C] float32.
        key: [B, N, C] float32, without CLS.
        weight: [B, N] float32.
        kept: [B, K] int64, -1 for padding rows.
        neighbours: how many, at most N - 1.

    Returns:
        [B, K, C] float32, zeros in padding rows; and [B, N] int64: the row whose key each patch's key is most
        similar to (0 where an image keeps none). Differentiable in patches and weight.
    """
    batch, length, _ = patches.shape
    inverse_norm = torch.linalg.vector_norm(key, dim=-1).clamp(min=1e-12).reciprocal()
    neighbours = min(neighbours, length - 1)
    first = torch.arange(batch, device=kept.device).view(-1, 1) * length
    # Padding repeats the first kept row, so that it can never be nearer to a patch than a real one.
    centre = torch.where(kept < 0, kept[:, :1], kept).clamp(min=0)
    merged, best, nearest = [], None, None
    for start in range(0, kept.shape[1], max(1, WORKSPACE // (batch * length))):
        rows = centre[:, start : start + max(1, WORKSPACE // (batch * length))]
        own = _rows(key, rows) * inverse_norm.gather(1, rows).unsqueeze(-1)
        similarity = torch.bmm(own, key.transpose(1, 2))
        top = similarity.max(1)
        if best is None or nearest is None:
            best, nearest = top
        else:
            nearest = torch.where(top.values > best, top.indices + start, nearest)
            best = torch.maximum(best, top.values)
        similarity.mul_(inverse_norm.unsqueeze(1)).scatter_(2, rows.unsqueeze(-1), -torch.inf)
        near = similarity.topk(neighbours, sorted=False).indices
        index = torch.cat([rows.unsqueeze(-1), near], -1)
        share = weight.unsqueeze(1).expand(-1, rows.shape[1], -1).gather(2, near)
        share = torch.cat([torch.ones_like(share[..., :1]), share], -1)
        share = share * (kept[:, start : start + rows.shape[1], None] >= 0)
        bags = (index + first.unsqueeze(-1)).flatten(0, 1)
        merged.append(
            F.embedding_bag(
                bags, patches.flatten(0, 1), per_sample_weights=share.flatten(0, 1), mode="sum"
            ).view(batch, rows.shape[1], -1)
        )
    return torch.cat(merged, 1), torch.where(nearest < (kept >= 0).sum(1, keepdim=True), nearest, 0)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """values [B, N, C], index [B, K] -> [B, K, C]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
