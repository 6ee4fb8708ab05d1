"""PruMerge and PruMerge+ (Shang et al., arXiv 2403.15388), as their released code behaves, image by image.

Select the patches whose CLS attention is an outlier, and for PruMerge+ a comb of spatial samples; merge into
each its 32 nearest patches by key similarity, weighted by attention; append one token, the attention-weighted
sum of all patches that were not kept. Where the paper's wording differs from the code (it appends no token,
for example), the code is followed: the published checkpoints were trained on it.

B images, N patches, C channels; K is the largest number of patches that an image of the batch keeps.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.ops import inverse, require_finite
from llava.reducers.registry import Reducer, ReducerSpecError, option, register
from llava.reducers.scores import SCORES, patch_scores, score_reads

NEIGHBOURS = 32
"""How many patches are merged into each that is kept, as released."""


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
        merge: false: the selection alone, kept patches as they are, no token appended (at least one is kept).
        score: what stands for the attention of CLS: cls, probe or mean (`scores.SCORES`); the first there is.
    """

    ratio: float | None = option(None, low=0, high=1, open_low=True)
    tokens: int | None = option(None, low=1)
    min_tokens: int | None = option(None, low=1)
    max_tokens: int | None = option(None, low=1)
    merge: bool | None = None
    score: str | None = option(None, choices=SCORES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens is not None and (self.ratio, self.min_tokens, self.max_tokens) != (None, None, None):
            raise ReducerSpecError(
                f"reducer {self.name!r}: tokens fixes the count; leave out ratio, min_tokens and max_tokens"
            )
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ReducerSpecError(
                f"reducer {self.name!r}: min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}"
            )

    @property
    def asks(self) -> tuple[str, ...]:
        return score_reads(self.score)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        """[B, N, C] patches -> at most N + 1 tokens an image, the appended one last.

        Scores and sums are float32 whatever the features are; the tokens have the patches' dtype.

        Raises:
            ReducerInputError: nothing to score patches by, or values that are NaN or infinite.
        """
        exact = features.float()  # once, for scores, similarities and sums
        attention = patch_scores(exact, self.score)
        order, count = self.select(*attention.sort(dim=1, descending=True, stable=True))
        if self.merge is False:
            count = count.clamp(min=1)

        # How many patches each image keeps, NaN where anything in its features is NaN or infinite: one
        # number an image, so that the device is waited for once.
        inputs = [x.flatten(1).sum(1) for x in (exact.patches, exact.key, attention)]
        sizes: list[float] = (count + 0 * sum(inputs)).tolist()
        require_finite([not math.isnan(size) for size in sizes])
        longest = int(max(sizes, default=0))

        kept = order[:, :longest]  # [B, K]
        is_row = torch.arange(longest, device=kept.device) < count.unsqueeze(1)  # [B, K], false: padding
        rank = inverse(order)
        is_kept = rank < count.unsqueeze(1)  # [B, N]
        padded = torch.where(is_row, kept, -1)
        if self.merge is False:
            image = torch.arange(len(kept), device=kept.device).unsqueeze(1)
            tokens = features.patches[image, kept] * is_row.unsqueeze(2)
            return ReducedTokens(tokens, count, padded, torch.where(is_kept, rank, -1))
        tokens, nearest = merge_nearest(exact, attention, kept, is_row, is_kept)
        return ReducedTokens(
            tokens=tokens.to(features.patches.dtype),
            lengths=count + 1,
            kept=F.pad(padded, (0, 1), value=-1),
            source=torch.where(is_kept, rank, nearest),
        )

    def select(self, descending: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Which patches to keep.

        Args:
            descending: [B, N] attention, largest first.
            order: [B, N] int64, the patches in that order.

        Returns:
            [B, N] int64, the patches of each image with the kept ones first; [B] int64, how many those are.
        """
        return order, self._count(descending).clamp(*self._limits(order.shape[1]))

    def _count(self, descending: Tensor) -> Tensor:
        """[B] how many patches to keep by attention, before `_limits`."""
        batch, length = descending.shape
        if self.ratio is not None:
            return torch.full((batch,), int(length * self.ratio), device=descending.device)
        # Strictly above the fence, so a flat attention has no outlier.
        return (descending > outlier_fence(descending).unsqueeze(1)).sum(1)

    def _limits(self, length: int) -> tuple[int, int]:
        """The least and the most patches to keep of so many; `tokens` is both."""
        most = min(self.tokens or self.max_tokens or length, length)
        return min(self.tokens or self.min_tokens or 0, most), most


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
        merge, score: as for `prumerge`.
    """

    def select(self, descending: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        length, rank = order.shape[1], inverse(order)
        index = torch.arange(length, device=order.device)  # patches in raster order
        low, high = self._limits(length)
        if self.tokens is not None:
            # `high // 2` teeth, each in the middle of its stretch of patches.
            teeth = (2 * index[: high // 2] + 1) * length // max(1, 2 * (high // 2))
            comb = torch.zeros_like(order, dtype=torch.bool).index_fill_(1, teeth, True)
            count = _count_to_reach(order, comb, high)
        elif self.ratio is not None:
            # The training branch: step // 2, then every step-th patch, the last (N - 1) never.
            count, step = self._count(descending), int(min(1 / self.ratio, 2 * length))
            comb = (index % step == step // 2) & (index < length - 1)
            comb = comb.expand_as(order)
        else:
            # The adaptive branch: stride = int(step / 3) with step = N // outliers, the last patch never
            # (the released code writes 575 for N = 576). No outlier, no comb.
            count = self._count(descending)
            stride = (length // count.clamp(min=1) // 3).clamp(min=1).unsqueeze(1)
            comb = (index % stride == 0) & (index < length - 1) & (count > 0).unsqueeze(1)
        if self.min_tokens or self.max_tokens:
            count, comb = _limit(order, rank, count, comb, low, high)
        # First the outliers by attention, then the comb in raster order, then what is not kept.
        behind = torch.where(comb, length, 2 * length) + index
        place = torch.where(rank < count.unsqueeze(1), rank, behind)
        return place.argsort(1), (place < 2 * length).sum(1)


def _limit(
    order: Tensor, rank: Tensor, count: Tensor, comb: Tensor, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """PruMerge+'s `count` [B] by attention and `comb` [B, N], with `low` to `high` different patches in all.

    Above `high` at most half of them stay by attention and the comb is thinned evenly; below `low` more are
    taken by attention.
    """
    total = (comb | (rank < count.unsqueeze(1))).sum(1)
    target = total.clamp(low, high)
    count = torch.where(total > target, torch.minimum(count, target - target // 2), count)
    comb = comb & (rank >= count.unsqueeze(1))
    there, room = comb.sum(1, keepdim=True), (target - count).unsqueeze(1)
    # Of M samples in a row, R stay evenly: those where (i R + M / 2) // M, i = 1..M, steps up.
    share = comb.cumsum(1) * room + there // 2
    thinned = comb & ((share // there.clamp(min=1)) > ((share - room) // there.clamp(min=1)))
    comb = torch.where(there > room, thinned, comb)
    return torch.maximum(count, _count_to_reach(order, comb, target.unsqueeze(1))), comb


def _count_to_reach(order: Tensor, comb: Tensor, total: Tensor | int) -> Tensor:
    """[B] how many patches to take by attention so that they and the comb are `total` different ones."""
    # Taking one more by attention adds a patch only where it is no tooth of the comb.
    gained = (~comb.gather(1, order)).long()
    before = comb.sum(1, keepdim=True) + gained.cumsum(1) - gained
    return (before < total).sum(1)


def merge_nearest(
    features: VisionFeatures, attention: Tensor, kept: Tensor, is_row: Tensor, is_kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Merges the nearest patches into each kept one, and what was not kept into one more token.

    Args:
        features: in float32.
        attention: [B, N] float32.
        kept: [B, K] int64, the kept patches of each image.
        is_row: [B, K] bool, false where an image keeps fewer.
        is_kept: [B, N] bool, the same by patch.

    Returns:
        [B, K + 1, C] float32: the kept tokens, behind them the one more, then zeros. [B, N] int64: the row
        with the most similar key to each patch's (0 where nothing is kept: the one more token).
        Differentiable in patches and attention.
    """
    (batch, count), patches = kept.shape, features.patches
    length, width = patches.shape[1:]
    image = torch.arange(batch, device=kept.device).unsqueeze(1)
    with torch.no_grad():
        # Cosine similarity of the kept keys with all N keys: the one large product. Its kernels differ with
        # the number of rows, in the last bit; whole blocks of 16 rows keep an image's similarities the same
        # (seen, not promised) in any batch. At least one row is added: where nothing is kept, `nearest` is 0.
        key = F.normalize(features.patch_key, dim=2, eps=1e-12)
        rows = F.pad(kept, (0, 16 - count % 16))
        similarity = torch.bmm(key[image, rows], key.transpose(1, 2))  # [B, rows, N]
        no_row = ~F.pad(is_row, (0, rows.shape[1] - count))
        nearest = similarity.masked_fill_(no_row.unsqueeze(2), -torch.inf).max(1).indices
        # Neighbours are taken from all other patches, kept or not: the 33 most similar, of which the patch
        # itself is made the first, whatever rounding says.
        similarity = similarity[:, :count].scatter_(2, kept.unsqueeze(2), torch.inf)
        near = similarity.topk(min(NEIGHBOURS + 1, length), sorted=False).indices  # [B, K, 33]

    # out_i = 1 f_i + sum over its neighbours of a_j f_j: not normalised, as released (norms grow slightly).
    weight = attention[image.unsqueeze(2), near].masked_fill(near == kept.unsqueeze(2), 1)
    weight = weight * is_row.unsqueeze(2)
    # A bag a row reads 33 patches each: a third of the time of a product of [K, N] weights with all patches.
    index = (near + image.unsqueeze(2) * length).flatten(0, 1)
    merged = F.embedding_bag(
        index, patches.flatten(0, 1), mode="sum", per_sample_weights=weight.flatten(0, 1)
    )
    # One token more, right behind an image's last: the sum of a_j f_j over all patches that are not kept.
    rest = torch.bmm((attention * ~is_kept).unsqueeze(1), patches)
    tokens = F.pad(merged.view(batch, count, width), (0, 0, 0, 1))
    return tokens.index_put_((image, is_row.sum(1, keepdim=True)), rest), nearest


def outlier_fence(descending: Tensor) -> Tensor:
    """Tukey's upper fence, Q3 + 1.5 (Q3 - Q1), quartiles by linear interpolation as torch.quantile's.

    Args:
        descending: [..., N] values sorted from the largest to the smallest.

    Returns:
        [...] the fence; outliers lie strictly above it.
    """
    last = descending.shape[-1] - 1

    def quantile(q: float) -> Tensor:
        below = int(q * last)
        lower, upper = descending[..., last - below], descending[..., max(last - below - 1, 0)]
        return torch.lerp(lower, upper, q * last - below)

    return torch.lerp(quantile(0.25), quantile(0.75), 2.5)
