"""SCOPE (NeurIPS 2025): patches that together cover all patches, the much attended first.

From the formula; the released code (kinredon/SCOPE) carries no licence for it and none of it is here.
"""

from dataclasses import dataclass

import torch

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.greedy import cosine, cover
from llava.reducers.ops import pick
from llava.reducers.registry import Reducer, option, register


@register("scope")
@dataclass(frozen=True)
class Scope(Reducer):
    """Greedy coverage by cosine similarity of the patches, weighted with CLS attention, in raster order.

    The count is each image's own (as released, a batch shares it out). A patch of zeros covers nothing and is
    covered by nothing (as released, it turns all similarities to NaN).

    Attributes:
        tokens: how many (all N where there are fewer).
        alpha: exponent of the attention; 0 is coverage alone.
        combined: how gain and attention meet, "multi" (the product) or "add" (their sum).
    """

    reads = ("cls_attn",)

    tokens: int = option(64, low=1)
    alpha: float = option(1.0, low=0)
    combined: str = option("multi", choices=("multi", "add"))

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        attention = features.cls_attn.float().sum(1) ** self.alpha
        combine = torch.add if self.combined == "add" else torch.mul
        count = min(self.tokens, features.patches.shape[1])
        chosen = cover(cosine(features.patches), count, attention, combine)
        return pick(features.patches, chosen.sort(1).values)
