"""Pictures of what a reducer did, patch by patch.

Drawn from `ReducedTokens.kept` and `.source` alone: they work for any reducer, and show what it did rather
than what it is said to do.
"""

from collections.abc import Sequence
from colorsys import hls_to_rgb
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from llava.mm_utils import get_anyres_image_grid_shape
from llava.reducers import ReducedTokens

CELL = 24
"""Pixels along the edge of a patch."""


@dataclass(frozen=True)
class Assignment:
    """Which token each patch of one image went to.

    Attributes:
        row: [N] the output token, -1 where the patch was dropped.
        kept: [N] bool, the token stands for this very patch.
        tokens: how many tokens came out.
    """

    row: np.ndarray
    kept: np.ndarray
    tokens: int

    @classmethod
    def of(cls, reduced: ReducedTokens) -> "Assignment":
        """The patches of a batch of one."""
        row = reduced.source[0].cpu().numpy()
        kept = (row >= 0) & (reduced.kept[0].cpu().numpy()[row] == np.arange(len(row)))
        return cls(row, kept, int(reduced.lengths[0]))

    @property
    def merged(self) -> np.ndarray:
        return ~self.kept & (self.row >= 0)


def squares(pixels: Tensor, image_processor: Any) -> list[Image.Image]:
    """[T, 3, S, S] normalised pixels, what the tower sees, as pictures again."""
    processor = image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    shades = ((pixels.float().cpu() * std + mean) * 255).round().clamp(0, 255).byte()
    return [Image.fromarray(view.permute(1, 2, 0).numpy()) for view in shades]


def tiles_across(size: tuple[int, int], views: Tensor, config: Any) -> int:
    """How many tiles of an anyres picture lie beside one another.

    Args:
        size: (width, height) of the picture.
        views: [T, 3, S, S] the picture as a whole, and its tiles row by row.
        config: of the checkpoint.
    """
    if config.mm_anyres_budget == "papers":
        return 2
    return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, views.shape[-1])[0]


def arrange(pictures: Sequence[Image.Image], across: int, gap: int = CELL) -> Image.Image:
    """The picture as a whole on the left, its tiles in their places on the right; alone where it has none."""
    whole, *tiles = pictures
    if not tiles:
        return whole
    width, height = whole.size
    sheet = Image.new("RGB", (width * (across + 1) + gap, height * (len(tiles) // across)), "white")
    sheet.paste(whole)
    for number, tile in enumerate(tiles):
        row, column = divmod(number, across)
        sheet.paste(tile, (width * (column + 1) + gap, height * row))
    return sheet


def overlay(square: Image.Image, reduced: ReducedTokens, grid: tuple[int, int]) -> Image.Image:
    """The picture with kept patches bright and framed, merged ones tinted by the token they went to.

    Args:
        square: the picture as the tower sees it.
        reduced: what the reducer returned for it (B = 1).
        grid: (rows, columns) of the patches.

    Returns:
        RGB, `CELL` pixels per patch. Where all patches were kept, the plain square.
    """
    return paint(canvas(square, grid), Assignment.of(reduced), grid, tint=True)


def canvas(square: Image.Image, grid: tuple[int, int]) -> Image.Image:
    """The picture in `CELL` pixels a patch."""
    rows, columns = grid
    return square.convert("RGB").resize((columns * CELL, rows * CELL), Image.Resampling.LANCZOS)


def paint(whole: Image.Image, patches: Assignment, grid: tuple[int, int], *, tint: bool) -> Image.Image:
    """Kept patches as they are and framed; the others darkened, or with `tint` in their token's colour.

    `whole` has `CELL` pixels a patch. Dropped patches are dark; where all are kept, it is returned as it is.
    """
    if patches.kept.all():
        return whole

    def spread(values: np.ndarray) -> np.ndarray:
        """One value per patch -> one per pixel."""
        return values.reshape(*grid, *values.shape[1:]).repeat(CELL, 0).repeat(CELL, 1)

    pixels = np.asarray(whole, dtype=np.float64) / 255
    grey = pixels.mean(-1, keepdims=True)
    colours = token_colours(patches, grid)
    rest = 0.16 * pixels + 0.1 * grey
    if tint:
        merged = spread(colours[np.maximum(patches.row, 0)]) * (0.1 + 0.8 * grey) + 0.1 * pixels
        rest = np.where(spread(patches.merged)[..., None], merged, 0.18 * grey)
    painted = np.where(spread(patches.kept)[..., None], pixels, rest)
    picture = Image.fromarray((painted * 255).round().astype(np.uint8))

    draw = ImageDraw.Draw(picture)
    if tint:  # a dark line where the token changes
        row = patches.row.reshape(grid)
        for y, x in CELL * np.argwhere(row[:, 1:] != row[:, :-1]):
            draw.line([(x + CELL, y), (x + CELL, y + CELL)], fill=(20, 22, 25))
        for y, x in CELL * np.argwhere(row[1:] != row[:-1]):
            draw.line([(x, y + CELL), (x + CELL, y + CELL)], fill=(20, 22, 25))
    for patch in np.flatnonzero(patches.kept):
        y, x = (CELL * int(place) for place in divmod(patch, grid[1]))
        edge = tuple((colours[patches.row[patch]] * 255).round().astype(int)) if tint else (255, 255, 255)
        draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), outline=edge, width=2 if tint else 1)
    return picture


def token_colours(patches: Assignment, grid: tuple[int, int]) -> np.ndarray:
    """[tokens, 3] RGB in 0..1: the hue says in which direction from the middle of the picture a token lies.

    A token lies on the patch it stands for, else in the middle of the patches that went to it. Neighbours are
    told apart by small steps of hue and lightness.
    """
    rows, columns = grid
    y, x = np.divmod(np.arange(len(patches.row)), columns)
    place = np.zeros((patches.tokens, 2))
    for token in range(patches.tokens):
        own = patches.row == token
        own = own & patches.kept if (own & patches.kept).any() else own
        if own.any():
            place[token] = y[own].mean() - (rows - 1) / 2, x[own].mean() - (columns - 1) / 2
    order = np.lexsort((place[:, 1], place[:, 0]))
    step = np.empty(patches.tokens)
    step[order] = np.arange(patches.tokens) * 0.61803398875 % 1.0 - 0.5  # golden steps: neighbours differ
    hue = (np.arctan2(place[:, 0], place[:, 1]) + 0.9 * step) / (2 * np.pi) % 1.0
    return np.array([hls_to_rgb(h, 0.62 + 0.2 * s, 0.65) for h, s in zip(hue, step, strict=True)])
