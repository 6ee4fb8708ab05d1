"""VisPruner (ICCV 2025): the most attended patches, and of the others those that differ."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.greedy import cosine
from llava.reducers.ops import pick, require_finite
from llava.reducers.registry import Reducer, option, register


@register("vispruner")
@dataclass(frozen=True)
class VisPruner(Reducer):
    """A share by CLS attention; the rest is thinned, eight a round, of those with a near twin; raster order.

    The outcome of the thinning hangs on the last bits of the similarities: on real features float32 and
    float64 have about two thirds of the tokens in common. Odd numbers of patches are split with one more at
    the even places (as released, an error for most counts).

    Attributes:
        tokens: how many (all N where there are fewer).
        ratio: the share taken by attention.
    """

    reads = ("cls_attn",)

    tokens: int = option(64, low=1)
    ratio: float = option(0.5, low=0, high=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        attention = features.cls_attn.float().mean(1)
        require_finite(attention.isfinite().all(1).tolist())
        count = min(self.tokens, attention.shape[1])
        important = int(count * self.ratio)
        order = attention.argsort(dim=1, descending=True, stable=True)
        kept = order[:, :important]
        if important < count:
            others = _thinned(cosine(features.patches), order[:, important:], count - important)
            kept = torch.cat([kept, others], 1)
        return pick(features.patches, kept.sort(1).values)


def _thinned(similarity: Tensor, left: Tensor, count: int) -> Tensor:
    """[B, L] int64 patches by descending attention -> [B, count], those without a near twin."""
    batch, length, _ = similarity.shape
    flat = similarity.flatten(0, 1)
    first = torch.arange(0, batch * length, length, device=left.device).unsqueeze(1)  # row of each image
    while left.shape[1] > count:
        even, odd = left[:, ::2], left[:, 1::2]
        drop = min(8, left.shape[1] - count, even.shape[1])
        # To its most similar odd one: whole rows of the odd ones, then the columns of the even ones.
        rows = flat.index_select(0, (odd + first).flatten()).view(batch, odd.shape[1], length)
        twin = rows.amax(1).gather(1, even)
        order = twin.argsort(dim=1, descending=True, stable=True)
        # The survivors' new order decides who is even in the next round: it is part of the method.
        left = torch.cat([even.gather(1, order[:, drop:]), odd], 1)
    return left
