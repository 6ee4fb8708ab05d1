"""The tensor operations that several reducers share: batched over images, scores in float32.

B images, N patches, C channels, K kept rows. Where a choice of tokens hangs on a number, the number comes
from operations that treat every row alone (multiply, sum, softmax, sort), never from a matrix product: the
kernels of those differ with the batch size, and a last bit would then decide which patch is kept.
"""

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens
from llava.reducers.registry import ReducerInputError


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
