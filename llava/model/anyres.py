"""AnyRes (LLaVA-1.6): how many tokens each tile of a picture keeps, and how the tiles become one sequence.

A picture is a small copy of itself and its tiles, T views in all, each through the tower by itself. The
conventions for their number of tokens (`mm_anyres_budget`):

- tile: the reducer's `tokens` is what each view keeps.
- shared: `tokens` is what the whole picture keeps, shared out by the attention mass of the views.
- papers: likewise for the whole picture, tokens / T a view, on pictures resized to 2 x 2 tiles
  (`llava.mm_utils`), so T = 5: LLaVA-1.6 at 672 x 672 as the literature's tables have it.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from llava.mm_utils import unpad_image
from llava.reducers import ReducedTokens, Reducer, VisionFeatures
from llava.reducers.ops import require_finite
from llava.reducers.scores import patch_scores

BUDGETS = ("tile", "shared", "papers")

KEEPS_PLACES = ("none", "topk", "grid", "random", "sequential")
"""Reducers whose tokens are whole patches in raster order: they can stand in the rows of the picture."""


def reduce_views(
    reducer: Reducer, features: VisionFeatures, pictures: Sequence[int], budget: str
) -> list[ReducedTokens]:
    """The tokens of each view, a batch of one without padding.

    Args:
        reducer: without a fixed `tokens` (papers alone) each view is reduced by itself.
        features: of all views of all pictures.
        pictures: how many views each picture has.

    Raises:
        ReducerInputError: as the reducer; features without the scores that `shared` weighs.
    """
    total = getattr(reducer, "tokens", None)
    counts: list[int | None] = []
    if budget == "tile" or total is None:
        counts = [None] * sum(pictures)
    else:
        most = features.patches.shape[1]
        masses = [1.0] * sum(pictures) if budget == "papers" else attention_mass(features, pictures, total)
        for number in pictures:
            start = len(counts)
            counts += share_out(total, masses[start : start + number], most)
    found: list[ReducedTokens] = []
    for count, run in groupby(counts):  # one batch for as many views in a row as keep the same number
        rows = slice(len(found), len(found) + len(list(run)))
        options: dict[str, Any] = {"tokens": count}  # not a field of every Reducer
        reduced = (reducer if count is None else replace(reducer, **options))(features[rows])
        found += reduced.split()
    return found


def attention_mass(features: VisionFeatures, pictures: Sequence[int], total: int) -> list[float]:
    """What the CLS row attends to most in each view: the sum of its k largest attentions to patches.

    k = total / T is an equal share of the T views of its picture, so that a view which looks the same
    everywhere counts k / N, and one whose attention lies on a few patches nearly 1. Towers without CLS: the
    score that takes its place (`llava.reducers.scores`).
    """
    scores = (
        patch_scores(features, heads=features.num_heads).sort(dim=1, descending=True).values
    )  # [views, N]
    share = torch.tensor([max(total // number, 1) for number in pictures for _ in range(number)])
    among = torch.arange(scores.shape[1]) < share.unsqueeze(1)
    mass = (scores * among.to(scores.device)).sum(1)
    require_finite(mass.isfinite().tolist())
    return mass.clamp(min=1e-12).tolist()  # not 0 where CLS looks at no patch at all


def share_out(total: int, masses: Sequence[float], most: int) -> list[int]:
    """`total` tokens over views in proportion to their masses, in whole numbers by the largest remainder.

    One token each, the others by mass; a view gets at most `most`, and what it cannot take goes to the rest.
    Fewer tokens than views: one each all the same.
    """
    counts = [most] * len(masses)
    views = list(range(len(masses)))  # those that are not full
    while views:
        left = max(total - most * (len(masses) - len(views)), len(views))
        whole = sum(masses[view] for view in views)
        exact = {view: 1 + (left - len(views)) * masses[view] / whole for view in views}
        if max(exact.values()) <= most:
            floors = {view: int(share) for view, share in exact.items()}
            spare = left - sum(floors.values())
            by_remainder = sorted(views, key=lambda view: floors[view] - exact[view])
            for rank, view in enumerate(by_remainder):
                counts[view] = floors[view] + (rank < spare)
            break
        views = [view for view in views if exact[view] < most]
    return counts


def join_tiles(
    tiles: Sequence[Tensor],
    kept: Sequence[Tensor],
    across: int,
    grid: tuple[int, int],
    newline: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """The tiles' tokens in the order of the rows of the picture, [K, D].

    Args:
        tiles: [K_i, D] of each tile, tiles row by row.
        kept: [K_i] int64, the patches of the tile that they are.
        across: tiles beside one another.
        grid: (rows, columns) of the patches of a tile.
        newline: [D] put behind each row of the picture that has a token; None: nowhere.
        size: (width, height) of a picture that was padded: with `newline`, tokens that only saw padding go.
    """
    rows, columns = grid
    width = across * columns
    places = []
    for tile, patch in enumerate(kept):
        row, column = tile // across * rows + patch // columns, tile % across * columns + patch % columns
        places.append(row * width + column)
    place, tokens = torch.cat(places), torch.cat(list(tiles))
    if newline is not None:
        if size is not None:
            whole = torch.arange(len(tiles) * rows * columns, device=place.device).view(1, -1, width)
            inside = torch.isin(place, unpad_image(whole, size))
            place, tokens = place[inside], tokens[inside]
        # Rows of one place more, for their end.
        row = place // width
        ends = row.unique() * (width + 1) + width
        place = torch.cat([place + row, ends])
        tokens = torch.cat([tokens, newline.to(tokens).expand(len(ends), -1)])
    return tokens[place.argsort()]
