"""PruMerge and PruMerge+ (Shang et al., arXiv 2403.15388), as their released code behaves, image by image.

Keep the patches whose CLS attention is an outlier, and for PruMerge+ a comb of spatial samples; add to each
its 32 nearest patches by key similarity, weighted by attention; append one token, the attention-weighted sum
of all patches that were not kept. Where the paper's wording differs from the code (it appends no token, for
example), the code is followed: the published checkpoints were trained on it.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.ops import (
    NEIGHBOURS,
    cls_attention_and_norms,
    comb,
    compiled_for,
    even_comb,
    images_at_a_time,
    inverse,
    merge_nearest,
    outlier_count,
    require_finite,
    stepped_comb,
)
from llava.reducers.registry import Reducer, ReducerSpecError, option, register


@register("prumerge")
@dataclass(frozen=True)
class PruMerge(Reducer):
    """Attention outliers, each merged with its nearest patches, and one token for all the rest.

    Without options the count is each image's own number of outliers (none on a flat attention: then the one
    appended token is all there is). Counts never include that appended token, as in published numbers.

    Attributes:
        ratio: keep int(N * ratio) patches instead.
        tokens: keep this many patches instead (all N where there are fewer).
        min_tokens: keep at least this many, the next by attention where outliers are fewer.
        max_tokens: keep at most this many, the first by attention.
    """

    ratio: float | None = option(None, low=0, high=1, open_low=True)
    tokens: int | None = option(None, low=1)
    min_tokens: int | None = option(None, low=1)
    max_tokens: int | None = option(None, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and (self.ratio, self.min_tokens, self.max_tokens) != (None, None, None):
            raise ReducerSpecError(
                f"reducer {self.name!r}: tokens fixes the count; leave out ratio, min_tokens and max_tokens"
            )
        if None not in (self.min_tokens, self.max_tokens) and self.min_tokens > self.max_tokens:
            raise ReducerSpecError(
                f"reducer {self.name!r}: min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}"
            )

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        """[B, N, C] patches -> at most N + 1 tokens an image, the appended one last.

        Needs memory for the features in float32 where they are not, and the workspace of `ops`.

        Raises:
            ReducerInputError: no CLS token, or values that are NaN or infinite.
        """
        exact = features.float()  # once, for the scores, the norms and the merge
        attention, norm = cls_attention_and_norms(exact)
        descending, order = attention.sort(dim=1, descending=True, stable=True)
        reduced = prune_and_merge(exact, attention, norm, *self.choose(descending, order))
        return replace(reduced, tokens=reduced.tokens.to(features.patches.dtype))

    def choose(self, descending: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Which patches to keep.

        Args:
            descending: [B, N] attention, largest first.
            order: [B, N] int64, the patches in that order.

        Returns:
            [B, N] int64, the patches of each image with the kept ones first; [B] int64, how many those are.
        """
        return order, self._count(descending).clamp(self._low(), self._high(descending.shape[1]))

    def _count(self, descending: Tensor) -> Tensor:
        """[B] patches to keep by attention, before the clamps."""
        batch, length = descending.shape
        if self.tokens is not None:
            return torch.full((batch,), min(self.tokens, length), device=descending.device)
        if self.ratio is not None:
            return torch.full((batch,), int(length * self.ratio), device=descending.device)
        return outlier_count(descending)

    def _low(self) -> int:
        return self.tokens or self.min_tokens or 0

    def _high(self, length: int) -> int:
        return min(self.tokens or self.max_tokens or length, length)


@register("prumerge+")
@dataclass(frozen=True)
class PruMergePlus(PruMerge):
    """PruMerge with spatial samples: kept are the outliers, then a comb over the patches in raster order.

    Without options the comb is about three samples an outlier, so four times PruMerge's tokens; from 97
    outliers of 576 on it is every patch but the last, as released: `max_tokens` bounds that.

    Attributes:
        ratio: the released training setting: int(N * ratio) patches by attention and a comb of one patch in
            int(1 / ratio), each patch once, so about 2 N ratio patches (1/8: 133 to 144 of 576).
        tokens: exactly this many: half by attention, half an even comb, and where the two meet the next by
            attention.
        min_tokens: at least this many, more by attention where there are fewer.
        max_tokens: at most this many: at most half by attention, the comb thinned evenly to fit.
    """

    def choose(self, descending: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        length = order.shape[1]
        if self.tokens is not None:
            total = min(self.tokens, length)
            samples = even_comb(order, total // 2)
            return _with_samples(order, _count_to_reach(order, samples, total), samples)
        count = self._count(descending)
        if self.ratio is not None:
            samples = stepped_comb(order, int(min(1 / self.ratio, 2 * length)))
        else:
            samples = comb(count, length)
        if self.min_tokens or self.max_tokens:
            count, samples = _clamp(order, count, samples, self._low(), self._high(length))
        return _with_samples(order, count, samples)


def _with_samples(order: Tensor, count: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
    """Brings the samples, in raster order, forward to behind the first `count` patches of `order`."""
    length, rank = order.shape[1], inverse(order)
    behind = torch.where(samples, length, 2 * length) + torch.arange(length, device=order.device)
    place = torch.where(rank < count.unsqueeze(1), rank, behind)
    return place.argsort(1), (place < 2 * length).sum(1)


def _clamp(order: Tensor, count: Tensor, samples: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """`choose` of PruMerge+ with the number of different patches brought between low and high.

    Above `high` at most half of them stay by attention and the samples are thinned evenly; below `low` more
    are taken by attention.
    """
    rank = inverse(order)
    total = (samples | (rank < count.unsqueeze(1))).sum(1)
    target = total.clamp(min(low, high), high)
    count = torch.where(total > target, torch.minimum(count, target - target // 2), count)
    samples = samples & (rank >= count.unsqueeze(1))
    there, room = samples.sum(1, keepdim=True), (target - count).unsqueeze(1)
    # Of M samples in a row, R stay evenly: those where (i R + M / 2) // M, i = 1..M, steps up.
    share = samples.cumsum(1) * room + there // 2
    kept = samples & ((share // there.clamp(min=1)) > ((share - room) // there.clamp(min=1)))
    samples = torch.where(there > room, kept, samples)
    return torch.maximum(count, _count_to_reach(order, samples, target.unsqueeze(1))), samples


def _count_to_reach(order: Tensor, samples: Tensor, total: Tensor | int) -> Tensor:
    """[B] how many patches to take by attention so that they and the samples are `total` different ones."""
    # Taking one more by attention adds a patch only where it is no sample.
    gained = (~samples.gather(1, order)).long()
    before = samples.sum(1, keepdim=True) + gained.cumsum(1) - gained
    return (before < total).sum(1)


def prune_and_merge(
    features: VisionFeatures, attention: Tensor, norm: Tensor, order: Tensor, count: Tensor
) -> ReducedTokens:
    """Keeps the first `count` patches of each image's `order`, merges the others into them and into one more.

    Features in float32, and so the tokens. Asks the device for one thing only: how many tokens each image has
    (NaN: it is not finite).
    """
    patches, key = features.patches, features.key
    kernels = compiled_for(patches, attention, norm)
    if kernels is not None:
        counts: list[int] = count.tolist()
        at_a_time = images_at_a_time(max(counts, default=0) * order.shape[1], order.device)
        *reduced, finite = kernels.merge(patches, key, norm, attention, order, counts, NEIGHBOURS, at_a_time)
        require_finite(finite)
        return ReducedTokens(*reduced)

    rank = inverse(order)
    is_kept = rank < count.unsqueeze(1)
    # Every patch takes part, kept ones with weight 0, so that a NaN or an infinity anywhere shows.
    rest = torch.bmm(attention.masked_fill(is_kept, 0).unsqueeze(1), patches)
    zero_or_nan = (rest.sum((1, 2)) + norm.sum(1)) * 0
    lengths = count + 1
    sizes: list[float] = (lengths + zero_or_nan).tolist()
    require_finite([not math.isnan(size) for size in sizes])
    most = int(max(sizes, default=1)) - 1

    kept, is_real = order[:, :most], None
    if min(sizes, default=1) <= most:
        is_real = torch.arange(most, device=order.device) < count.unsqueeze(1)
        kept = torch.where(is_real, kept, kept[:, :1])
    tokens, nearest = merge_nearest(patches, key, norm, attention, kept, is_real)
    tokens.scatter_(1, count.view(-1, 1, 1).expand(-1, 1, tokens.shape[2]), rest)
    if is_real is not None:
        # A padding row is its image's first once more: whatever went there belongs to the first.
        nearest = torch.where(nearest < count.unsqueeze(1), nearest, 0)
        kept = torch.where(is_real, kept, -1)
    return ReducedTokens(
        tokens=tokens,
        lengths=lengths,
        kept=F.pad(kept, (0, 1), value=-1),
        source=torch.where(is_kept, rank, nearest),
    )
