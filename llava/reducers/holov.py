"""HoloV (NeurIPS 2025): every stretch of the image gets its share of the tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.ops import pick, require_finite
from llava.reducers.registry import Reducer, option, register


@register("holov")
@dataclass(frozen=True)
class HoloV(Reducer):
    """Stretches of consecutive patches share the tokens by their mean attention; inside, the most attended.

    Order: stretch by stretch, inside it by descending attention, in raster order where all of it is kept. The
    released score of a stretch also has the variance of cosine similarities, which cancels: each stretch's is
    divided by its own mean (1000 a (1 + 0.09 V / V)). What is more than a stretch holds goes to the most
    attended patches elsewhere (as released, rows of zeros).

    Attributes:
        tokens: how many (all N where there are fewer).
        chunks: how many stretches, as equal as can be (N where there are fewer).
    """

    reads = ("cls_attn",)

    tokens: int = option(64, low=1)
    chunks: int = option(16, low=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        attention = features.cls_attn.float().mean(1)
        require_finite(attention.isfinite().all(1).tolist())
        count = min(self.tokens, attention.shape[1])
        return pick(features.patches, _by_stretch(attention, count, self.chunks))


@torch.no_grad()
def _by_stretch(attention: Tensor, count: int, chunks: int) -> Tensor:
    """[B, N] attention -> [B, count] int64 patches in the order of the output."""
    length, place = attention.shape[1], torch.arange(attention.shape[1], device=attention.device)
    chunks = min(chunks, length)
    size, larger = divmod(length, chunks)  # the first `larger` stretches have one patch more
    chunk = torch.maximum(place // (size + 1), (place - larger) // size)
    member = chunk == torch.arange(chunks, device=place.device).unsqueeze(1)  # [chunks, N]
    sizes = member.sum(1)

    score = 1090 * (attention.unsqueeze(1) * member).sum(2) / sizes
    share = score / (score.sum(1, keepdim=True) + 1e-6)
    quota = (share * count).floor().long()
    rank = share.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    quota += rank < count - quota.sum(1, keepdim=True)

    # Sorted by attention, then stably by stretch: each stretch takes the very places it has in raster order.
    order = attention.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, chunk[order].argsort(dim=1, stable=True))
    order = torch.where((quota >= sizes)[:, chunk], place, order)
    within = place - (sizes.cumsum(0) - sizes)[chunk]
    chosen = within < quota[:, chunk]
    rank = chosen + attention.gather(1, order)  # attention is below 1: the chosen, then by attention
    best = rank.argsort(dim=1, descending=True, stable=True)[:, :count]
    return order.gather(1, best.sort(1).values)
