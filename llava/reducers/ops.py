"""The tensor operations that several reducers share: batched over images, scores in float32.

B images, N patches, C channels, K kept rows. Where a choice of tokens hangs on a number, the number comes
from operations that treat every row alone (multiply, sum, softmax, sort), never from a matrix product: the
kernels of those differ with the batch size, and a last bit would then decide which patch is kept.
"""

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.registry import ReducerInputError


def cls_attention(features: VisionFeatures) -> Tensor:
    """PruMerge's attention of the CLS row: softmax(q_cls . k_j / sqrt(C)) over all N + 1 rows, CLS dropped.

    One head of C channels, not the tower's heads (facts of the released code, 42Shawn/LLaVA-PruMerge), so a
    row sums to less than 1; it is not renormalised.

    Returns:
        [B, N] float32, the same bits for an image whatever batch it comes in.

    Raises:
        ReducerInputError: the tower has no CLS token.
    """
    return _attention(features, heads=1)[:, 0]


def cls_attention_per_head(features: VisionFeatures) -> Tensor:
    """The tower's own attention of the CLS row: softmax(q_h . k_h / sqrt(C / heads)), CLS dropped.

    Returns:
        [B, heads, N] float32, the same bits for an image whatever batch it comes in.

    Raises:
        ReducerInputError: the tower has no CLS token.
    """
    return _attention(features, heads=features.num_heads)


def _attention(features: VisionFeatures, heads: int) -> Tensor:
    """[B, heads, N] attention of the CLS query over all keys, the CLS column dropped after the softmax."""
    if features.query is None:
        raise ReducerInputError(
            "this method reads the attention of the CLS token, and this vision tower has none: "
            "use pool, grid or random with it"
        )
    width = features.key.shape[2] // heads
    # float32 first: q . k in float16 can overflow. Multiply and sum, not a product, see above.
    query = (features.query.float() * width**-0.5).unsqueeze(1)  # [B, 1, C]
    logits = (features.key.float() * query).unflatten(2, (heads, width)).sum(3)  # [B, N + 1, heads]
    return logits.softmax(1)[:, 1:].transpose(1, 2)


def require_finite(finite: list[bool]) -> None:
    """Raises ReducerInputError, naming the images, unless every image of a batch is finite."""
    if not all(finite):
        bad = ", ".join(str(image) for image, good in enumerate(finite) if not good)
        raise ReducerInputError(
            f"the vision features of image {bad} of the batch (counted from 0) hold NaN or infinite values"
        )


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


def inverse(order: Tensor) -> Tensor:
    """The rank of each patch in `order`: the inverse of permutations [B, N] int64."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)
