"""What PruMerge is compared with: all tokens, random, the first, a grid of, the most attended; averages."""

from dataclasses import dataclass

import torch

from llava.reducers.features import ReducedTokens, VisionFeatures
from llava.reducers.ops import pick, require_finite
from llava.reducers.registry import Reducer, option, register
from llava.reducers.scores import SCORES, patch_scores, score_reads

QUARTER = 144
"""Tokens of a baseline that is given no number: a quarter of CLIP-L/14-336's 576, PruMerge+'s average."""


@register("none")
@dataclass(frozen=True)
class Everything(Reducer):
    """All N patches in raster order, as LLaVA-1.5 uses them."""

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        batch, length, _ = features.patches.shape
        index = torch.arange(length, device=features.patches.device).repeat(batch, 1)
        return ReducedTokens(features.patches, index.new_full((batch,), length), index, index)


@register("random")
@dataclass(frozen=True)
class RandomPatches(Reducer):
    """Patches at random places in raster order: the same places for every image, drawn from the seed alone.

    Attributes:
        tokens: how many (all N where there are fewer).
        seed: of the draw.
    """

    tokens: int = option(QUARTER, low=1)
    seed: int = option(0, low=0, high=2**63 - 1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        batch, length, _ = features.patches.shape
        drawn = torch.randperm(length, generator=torch.Generator().manual_seed(self.seed))[: self.tokens]
        return pick(features.patches, drawn.sort().values.to(features.patches.device).repeat(batch, 1))


@register("sequential")
@dataclass(frozen=True)
class FirstPatches(Reducer):
    """The first patches in raster order, the top of the image: the paper's "sequential" sampling.

    Attributes:
        tokens: how many (all N where there are fewer).
    """

    tokens: int = option(QUARTER, low=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        batch, length, _ = features.patches.shape
        index = torch.arange(min(self.tokens, length), device=features.patches.device)
        return pick(features.patches, index.repeat(batch, 1))


@register("grid")
@dataclass(frozen=True)
class GridPatches(Reducer):
    """The patches at the centres of a grid of rows x columns laid over the image, in raster order.

    Attributes:
        tokens: rows x columns is the most of this that cells no longer than twice their width allow
            (64 is 8 x 8 and 40 is 5 x 8, but 38 is 6 x 6).
    """

    tokens: int = option(QUARTER, low=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        (rows, columns), (high, wide) = features.grid, grid_shape(self.tokens, *features.grid)
        device = features.patches.device
        y = ((torch.arange(high, device=device) * 2 + 1) * rows) // (2 * high)
        x = ((torch.arange(wide, device=device) * 2 + 1) * columns) // (2 * wide)
        index = (y.unsqueeze(1) * columns + x).flatten()
        return pick(features.patches, index.repeat(features.patches.shape[0], 1))


@register("topk")
@dataclass(frozen=True)
class TopAttention(Reducer):
    """The patches the CLS token attends to most, in raster order; the others are dropped, none is merged.

    The score is that of FasterVLM (Zhang et al., arXiv 2412.01818): the tower's own softmax attention of the
    CLS row, head by head, averaged over heads. Ties go to the patch that comes first.

    Attributes:
        tokens: how many (all N where there are fewer).
        score: what stands for the attention of CLS: cls, probe or mean (`scores.SCORES`); the first there is.
    """

    tokens: int = option(QUARTER, low=1)
    score: str | None = option(None, choices=SCORES)

    @property
    def asks(self) -> tuple[str, ...]:
        return score_reads(self.score)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        """Raises ReducerInputError where there is nothing to score patches by, or it is not finite."""
        score = patch_scores(features, self.score, heads=features.num_heads)
        require_finite(score.isfinite().all(1).tolist())
        best = score.sort(dim=1, descending=True, stable=True).indices[:, : self.tokens]
        return pick(features.patches, best.sort(dim=1).values)


@register("pool")
@dataclass(frozen=True)
class AveragePool(Reducer):
    """Means over the cells of a grid of rows x columns: every patch belongs to exactly one cell.

    A mean stands for no single patch, so `kept` is -1 throughout; `source` is the cell.

    Attributes:
        tokens: rows x columns, chosen as by `grid`.
    """

    tokens: int = option(QUARTER, low=1)

    def reduce(self, features: VisionFeatures) -> ReducedTokens:
        (rows, columns), (high, wide) = features.grid, grid_shape(self.tokens, *features.grid)
        patches = features.patches
        y = torch.arange(rows, device=patches.device) * high // rows
        x = torch.arange(columns, device=patches.device) * wide // columns
        cell = (y.unsqueeze(1) * wide + x).flatten()
        batch, count = patches.shape[0], high * wide
        member = (torch.arange(count, device=patches.device).unsqueeze(1) == cell).float()
        mean = torch.matmul(member / member.sum(1, keepdim=True), patches.float())
        return ReducedTokens(
            tokens=mean.to(patches.dtype),
            lengths=cell.new_full((batch,), count),
            kept=cell.new_full((batch, count), -1),
            source=cell.repeat(batch, 1),
        )


def grid_shape(tokens: int, rows: int, columns: int) -> tuple[int, int]:
    """The grid of at most `tokens` cells over rows x columns patches: the most cells, then the squarest.

    Cells longer than twice their width are passed over, unless the picture's shape leaves no others.
    """

    def elongation(shape: tuple[int, int]) -> float:
        high, wide = rows / shape[0], columns / shape[1]
        return max(high / wide, wide / high)

    shapes = [(high, min(columns, tokens // high)) for high in range(1, min(rows, tokens) + 1)]
    limit = max(2.0, min(map(elongation, shapes)))
    fitting = [shape for shape in shapes if elongation(shape) <= limit]
    return max(fitting, key=lambda shape: (shape[0] * shape[1], -elongation(shape)))
