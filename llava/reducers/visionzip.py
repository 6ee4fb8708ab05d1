"""VisionZip (CVPR 2025): CLS, the patches it attends to most, and tokens merged from the others."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.greedy import group_mean, unit
from llava.reducers.ops import pick, require_finite
from llava.reducers.registry import Reducer, ReducerSpecError, option, register


@register("visionzip")
@dataclass(frozen=True)
class VisionZip(Reducer):
    """The CLS row first, the dominant patches in raster order, then the contextual tokens.

    A contextual token is a patch at an even stride of the rest, plus the mean of those of the rest whose keys
    are most similar to its key; not an average: its norm about doubles. `kept` is -1 for the CLS row.

    Attributes:
        tokens: how many in all, the CLS row among them; at most N + 1.
        contextual: how many of those are merged ones; unset, 10 in 64 as published (54 + 10, 108 + 20,
            162 + 30). 0 merges nothing (as released, an error).
    """

    reads = ("cls", "cls_attn", "block_key")

    tokens: int = option(64, low=1)
    contextual: int | None = option(None, low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.contextual is not None and self.contextual >= self.tokens:
            raise ReducerSpecError(
                f"reducer 'visionzip': contextual {self.contextual} must be below tokens {self.tokens}, "
                "of which one is the CLS row"
            )

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        patches, attention = features.patches, features.cls_attn.float().sum(1)
        require_finite(attention.isfinite().all(1).tolist())
        contextual = self.tokens * 10 // 64 if self.contextual is None else self.contextual
        order = attention.argsort(dim=1, descending=True, stable=True)
        dominant = min(self.tokens - contextual - 1, patches.shape[1])
        rest = order[:, dominant:].sort(1).values
        contextual = min(contextual, rest.shape[1])
        stride = max(1, rest.shape[1] // max(1, contextual))
        target = rest[:, ::stride][:, :contextual]
        own = pick(patches, torch.cat([order[:, :dominant].sort(1).values, target], 1))

        tokens, source = own.tokens, own.source
        if contextual:
            others = source < 0
            source = torch.where(others, dominant + _nearest(features, target), source)
            mean = group_mean(patches, source.masked_fill(~others, -1), tokens.shape[1])  # 0 for the dominant
            tokens = (tokens + mean).to(patches.dtype)
        return ReducedTokens(
            tokens=torch.cat([features.cls, tokens], 1),
            lengths=own.lengths + 1,
            kept=F.pad(own.kept, (1, 0), value=-1),
            source=torch.where(source < 0, -1, source + 1),
        )


@torch.no_grad()
def _nearest(features: VisionFeatures, target: Tensor) -> Tensor:
    """[B, N] int64: for each patch the target with the most similar key (mean over heads)."""
    key = unit(features.block_key[:, 1:].float().unflatten(2, (features.num_heads, -1)).mean(2))
    targets = key.gather(1, target.unsqueeze(2).expand(-1, -1, key.shape[2]))
    return torch.bmm(key, targets.transpose(1, 2)).argmax(2)
