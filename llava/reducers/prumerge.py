"""PruMerge and PruMerge+ (Shang et al., arXiv 2403.15388), as their released code behaves, image by image.

Keep the patches whose CLS attention is an outlier, and for PruMerge+ a comb of spatial samples; add to each
its 32 nearest patches by key similarity, weighted by attention; append one token, the attention-weighted sum
of all patches that were not kept. Where the paper's wording differs from the code (it appends no token, for
example), the code is followed: the published checkpoints were trained on it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.ops import cls_attention, comb, merge_nearest, outlier_count
from llava.reducers.registry import Reducer, ReducerInputError, ReducerSpecError, option, register


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
                f"reducer {self.name!r}: tokens fixes the count already; leave out ratio, min_tokens, max_tokens"
            )
        if None not in (self.min_tokens, self.max_tokens) and self.min_tokens > self.max_tokens:
            raise ReducerSpecError(
                f"reducer {self.name!r}: min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}"
            )

    def __call__(self, features: VisionFeatures) -> ReducedTokens:
        """[B, N, C] patches -> at most N + 1 tokens an image, the appended one last.

        Needs memory for the features in float32 where they are not, and the workspace of `ops`.

        Raises:
            ReducerInputError: no CLS token, or values that are NaN or infinite.
        """
        attention = cls_attention(features)
        descending, order = attention.sort(dim=1, descending=True, stable=True)
        top, samples = self.choose(descending, order)
        return _prune_and_merge(features, attention, order, top, samples)

    def choose(self, descending: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """How many patches to keep by attention, and which besides.

        Args:
            descending: [B, N] attention, largest first.
            order: [B, N] int64, the patches in that order.

        Returns:
            [B] int64 count of the first patches in `order` to keep; [B, N] bool spatial samples (they may
            name some of those patches again).
        """
        count = self._count(descending).clamp(self._low(), self._high(descending.shape[1]))
        return count, torch.zeros_like(order, dtype=torch.bool)

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
            spatial = min(self.tokens, length) // 2
            teeth = [int((i + 0.5) * length / spatial) for i in range(spatial)]
            count = self._count(descending) - spatial
            samples = _teeth(order, teeth)
        elif self.ratio is not None:
            step = int(1 / self.ratio)
            count = self._count(descending)
            samples = _teeth(order, range(step // 2, length - 1, step))
        else:
            count = self._count(descending)
            samples = comb(count, length)
        if self.tokens or self.min_tokens or self.max_tokens:
            return _clamp(order, count, samples, self._low(), self._high(length))
        return count, samples


def _teeth(order: Tensor, at: "list[int] | range") -> Tensor:
    """[B, N] bool, true at the given patches of every image."""
    samples = torch.zeros_like(order, dtype=torch.bool)
    samples[:, list(at)] = True
    return samples


def _clamp(order: Tensor, count: Tensor, samples: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """`choose` of PruMerge+ with the number of different patches brought between low and high.

    Above `high` at most half of them stay by attention and the samples are thinned evenly; below `low` more
    are taken by attention.
    """
    rank = _inverse(order)
    total = (samples | (rank < count.unsqueeze(1))).sum(1)
    target = total.clamp(min(low, high), high)
    count = torch.where(total > target, torch.minimum(count, target - target // 2), count)
    samples = samples & (rank >= count.unsqueeze(1))
    there, room = samples.sum(1, keepdim=True), (target - count).unsqueeze(1)
    # Of M samples in a row, R stay evenly: those where (i R + M / 2) // M, i = 1..M, steps up.
    share = samples.cumsum(1) * room + there // 2
    kept = samples & ((share // there.clamp(min=1)) > ((share - room) // there.clamp(min=1)))
    samples = torch.where(there > room, kept, samples)
    # Taking one more by attention adds a patch only where it is no sample.
    gained = samples.sum(1, keepdim=True) + (~samples.gather(1, order)).cumsum(1)
    needed = (gained < target.unsqueeze(1)).sum(1) + (samples.sum(1) < target)
    return torch.maximum(count, needed), samples


def _inverse(order: Tensor) -> Tensor:
    """The rank of each patch in `order`, [B, N] int64: the inverse permutation."""
    ranks = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks)


def _prune_and_merge(
    features: VisionFeatures, attention: Tensor, order: Tensor, top: Tensor, samples: Tensor
) -> ReducedTokens:
    """Keeps the first `top` patches of `order`, then the other `samples` in raster order; merges the rest.

    Asks the device for one thing only: how many tokens each image has (0 marks one that is not finite).
    """
    batch, length, _ = features.patches.shape
    patches, key = features.patches.float(), features.key[:, 1:].float()
    rank = _inverse(order)
    by_attention = rank < top.unsqueeze(1)
    samples = samples & ~by_attention
    is_kept = by_attention | samples
    count = is_kept.sum(1)
    row = torch.where(by_attention, rank, top.unsqueeze(1) + samples.cumsum(1) - 1)

    index = torch.arange(length, device=order.device).expand(batch, -1)
    aside = length + 1  # a column for patches that have no row of their own
    kept = order.new_full((batch, length + 2), -1)
    kept.scatter_(1, torch.where(is_kept, row, aside), index)

    # Every patch takes part, the kept ones with weight 0, so that no NaN or infinity goes unseen.
    rest = torch.bmm((attention * ~is_kept).unsqueeze(1), patches)
    lengths = count + 1
    counts: list[int] = (lengths * rest.isfinite().all(2).squeeze(1)).tolist()
    if 0 in counts:
        bad = ", ".join(str(i) for i, tokens in enumerate(counts) if tokens == 0)
        raise ReducerInputError(
            f"the vision features of image {bad} of the batch (counted from 0) hold NaN or infinite values"
        )
    longest = max(counts, default=1)

    kept = kept[:, :longest].contiguous()
    tokens, nearest = merge_nearest(patches, key, attention, kept)
    tokens = tokens.scatter(1, count.view(-1, 1, 1).expand(-1, 1, tokens.shape[2]), rest)
    return ReducedTokens(
        tokens=tokens.to(features.patches.dtype),
        lengths=lengths,
        kept=kept,
        source=torch.where(is_kept, row, nearest),
    )
