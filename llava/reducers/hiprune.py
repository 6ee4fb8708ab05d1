"""HiPrune: patches attended to in the middle of the tower, their neighbours, and those attended to later."""

from dataclasses import dataclass

import torch

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.ops import pick, require_finite
from llava.reducers.registry import Reducer, option, register


@register("hiprune")
@dataclass(frozen=True)
class HiPrune(Reducer):
    """Anchors by attention received in a middle block, the patches around them, the rest by a deep block.

    As released, neighbours left and right run on into the next row, and those above the first or below the
    last row become the first and the last patch. The grid is the image's own (as released, 24 x 24), and so
    is the count (as released, a batch shares it out). Where anchors and neighbours are more than `tokens`,
    anchors go first (as released, an error).

    Attributes:
        tokens: how many (all N where there are fewer).
        alpha: share of the tokens that goes to anchors with their neighbours, five each.
    """

    reads = ("attn_mid", "attn_deep")

    tokens: int = option(64, low=1)
    alpha: float = option(0.1, low=0, high=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        length, columns = features.patches.shape[1], features.grid[1]
        middle, deep = features.attn_mid[:, 1:].float(), features.attn_deep[:, 1:].float()
        require_finite((middle + deep).isfinite().all(1).tolist())
        count = min(self.tokens, length)
        anchors = middle.sort(dim=1, descending=True, stable=True).indices[:, : round(count * self.alpha / 5)]
        step = torch.tensor([-columns, -1, 0, 1, columns], device=anchors.device)
        around = (anchors.unsqueeze(2) + step).clamp(0, length - 1).flatten(1)
        # Attention is at most 1, so whole numbers set the classes apart.
        rank = deep + torch.zeros_like(deep).scatter_(1, around, 1).scatter_(1, anchors, 2)
        best = rank.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return pick(features.patches, best.sort(1).values)
