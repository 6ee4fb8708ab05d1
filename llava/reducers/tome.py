"""ToMe (Bolya et al., ICLR 2023), after the tower: the most similar patches are averaged, pair by pair."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.greedy import group_mean, unit
from llava.reducers.ops import inverse, require_finite
from llava.reducers.registry import Reducer, option, register


@register("tome")
@dataclass(frozen=True)
class ToMe(Reducer):
    """Bipartite soft matching in rounds, each of which at most halves the tokens, until `tokens` are left.

    ToMe does one round in every block of a tower; PruMerge's paper compares with it, and here all rounds come
    after the tower, on the mean over heads of the keys. A token is the mean of its patches; `kept` is the one
    the others were merged into. No token stands for CLS.

    Attributes:
        tokens: how many (all N where there are fewer).
    """

    reads = ("block_key",)

    tokens: int = option(64, low=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        patches = features.patches
        batch, length, _ = patches.shape
        key = features.block_key[:, -length:].float().unflatten(2, (features.num_heads, -1)).mean(2)
        require_finite(key.sum(2).isfinite().all(1).tolist())
        source, kept = _merged(key, min(self.tokens, length))
        tokens = group_mean(patches, source, kept.shape[1])
        return ReducedTokens(tokens.to(patches.dtype), kept.new_full((batch,), kept.shape[1]), kept, source)


@torch.no_grad()
def _merged(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[B, N, c] keys -> [B, N] the row of the output each patch goes to, [B, count] the patch that stayed."""
    batch, length, _ = key.shape
    root = torch.arange(length, device=key.device).repeat(batch, 1)
    group = root
    while (now := root.shape[1]) > count:
        gone = min(now // 2, now - count)
        metric = unit(group_mean(key, group, now))
        # Every token at an even place (A) proposes the most similar one at an odd place (B).
        best, partner = torch.bmm(metric[:, ::2], metric[:, 1::2].transpose(1, 2)).max(2)
        edge = best.argsort(dim=1, descending=True, stable=True)
        # The first `gone` of A by similarity join their B; then come the others of A in that order, then B.
        rank, stay = inverse(edge), edge.shape[1] - gone
        row = torch.empty_like(root)
        row[:, ::2] = torch.where(rank < gone, stay + partner, rank - gone)
        row[:, 1::2] = torch.arange(stay, now - gone, device=key.device)
        group = row.gather(1, group)
        root = torch.cat([root[:, ::2].gather(1, edge[:, gone:]), root[:, 1::2]], 1)
    return group, root
