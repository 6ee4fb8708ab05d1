"""EViT (Liang et al., ICLR 2022), after the tower: the most attended patches and one token for the rest."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.ops import pick, require_finite
from llava.reducers.registry import Reducer, option, register


@register("evit")
@dataclass(frozen=True)
class EViT(Reducer):
    """The patches CLS attends to most, in raster order, and last the sum of a_j x_j over all others.

    EViT does this in several blocks of a tower; PruMerge's paper compares with it, and here it acts once,
    after the tower. The weights are not normalised.

    Attributes:
        tokens: how many, the summed one among them (all N patches alone where there are fewer).
    """

    reads = ("cls_attn",)

    tokens: int = option(64, low=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        attention = features.cls_attn.float().mean(1)
        require_finite(attention.isfinite().all(1).tolist())
        best = attention.argsort(dim=1, descending=True, stable=True)
        if self.tokens > attention.shape[1]:
            return pick(features.patches, best.sort(1).values)
        kept = best[:, : self.tokens - 1].sort(1).values
        selected = pick(features.patches, kept)
        rest = torch.bmm(attention.scatter(1, kept, 0).unsqueeze(1), features.patches.float())
        return ReducedTokens(
            tokens=torch.cat([selected.tokens, rest.to(features.patches.dtype)], 1),
            lengths=selected.lengths + 1,
            kept=F.pad(kept, (0, 1), value=-1),
            source=torch.where(selected.source < 0, kept.shape[1], selected.source),
        )
