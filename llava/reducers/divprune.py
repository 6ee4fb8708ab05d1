"""DivPrune (CVPR 2025): patches far from one another, by greedy max-min distance after the projector.

From the formula; the released code (vbdi/divprune) is CC BY-NC 4.0 and none of it is here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.greedy import cosine
from llava.reducers.ops import pick, require_finite
from llava.reducers.registry import Reducer, option, register


@register("divprune")
@dataclass(frozen=True)
class DivPrune(Reducer):
    """Farthest-point selection by cosine distance of the projected patches, in raster order.

    A patch is chosen once, also where fewer than `tokens` differ (as released, one is repeated), and each
    image gets its own (as released, the first image's places serve the whole batch). The published ratio
    0.098 of 576 is tokens=56.

    Attributes:
        tokens: how many (all N where there are fewer).
    """

    reads = ("projected",)

    tokens: int = option(64, low=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        chosen = _farthest(cosine(features.projected), min(self.tokens, features.patches.shape[1]))
        return pick(features.patches, chosen.sort(1).values)


def _farthest(similarity: Tensor, count: int) -> Tensor:
    """[B, N, N] cosines -> [B, count] int64: next is the patch least similar to its nearest chosen one."""
    length = similarity.shape[1]
    similarity.diagonal(dim1=1, dim2=2).fill_(-1)
    nearest = similarity.amax(2)  # before any is chosen: to all others
    require_finite(nearest.isfinite().all(1).tolist())
    chosen = [nearest.argmin(1, keepdim=True)]
    nearest.fill_(-1)
    for _ in range(count - 1):
        row = similarity.gather(1, chosen[-1].unsqueeze(2).expand(-1, -1, length)).squeeze(1)
        nearest = torch.maximum(nearest, row).scatter_(1, chosen[-1], torch.inf)
        chosen.append(nearest.argmin(1, keepdim=True))
    return torch.cat(chosen, 1)
