"""`llava show`: what a reducer sees in a picture, what it keeps, and where the rest goes.

Pictures are drawn from two things only: the attention of the CLS row (the sparsity PruMerge rests on) and the
provenance a reducer returns (`ReducedTokens.kept`, `.source`). So they work for any reducer, and show what it
did rather than what it is said to do.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from llava import hardware
from llava.analysis import charts
from llava.analysis.charts import ACCENT, FAINT, INK
from llava.errors import UserError
from llava.mm_utils import expand2square, load_image, mean_colour
from llava.model.checkpoints import inspect_checkpoint, resolve_directory
from llava.model.vision_tower import VisionTower, load_vision_tower
from llava.reducers import ReducedTokens, ReducerInputError, ReducerSpecError, VisionFeatures, build_reducer
from llava.reducers.ops import cls_attention
from llava.reducers.prumerge import outlier_fence

MINI_TOWER = Path("checkpoints/mini-base/vision_tower")

CELL = 24
"""Pixels along the edge of a patch in the pictures."""

PADDING = (124, 116, 104)
"""Colour of the padding where no image processor says otherwise (ImageNet's mean)."""


@dataclass(frozen=True)
class Fate:
    """What became of each patch of one image.

    Attributes:
        row: [N] the output token a patch went to, -1 where it went nowhere.
        kept: [N] bool, the token stands for this very patch.
        tokens: how many tokens came out.
    """

    row: np.ndarray
    kept: np.ndarray
    tokens: int

    @property
    def merged(self) -> np.ndarray:
        return ~self.kept & (self.row >= 0)


def fate(reduced: ReducedTokens, index: int = 0) -> Fate:
    """What became of the patches of image `index` of a batch."""
    row = reduced.source[index].cpu().numpy()
    standing_for = reduced.kept[index].cpu().numpy()
    patches = np.arange(len(row))
    kept = (row >= 0) & (standing_for[row] == patches)
    return Fate(row, kept, int(reduced.lengths[index]))


def as_seen(image: Image.Image, *, aspect_ratio: str | None = "pad", background=PADDING) -> Image.Image:
    """The square a tower sees: the picture padded to a square, or its middle where `aspect_ratio` crops."""
    if aspect_ratio == "pad":
        return expand2square(image, background)
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def overlay(
    image: Image.Image,
    reduced: ReducedTokens,
    grid: tuple[int, int],
    *,
    index: int = 0,
    aspect_ratio: str | None = "pad",
    background: tuple[int, ...] = PADDING,
) -> Image.Image:
    """The picture with kept patches bright and framed, merged ones tinted by the token they went to.

    Args:
        image: the RGB picture as it was loaded.
        reduced: what the reducer returned for it.
        grid: (rows, columns) of the patches.
        index: which image of the batch `reduced` holds.
        aspect_ratio, background: how the picture was made a square, see `as_seen`.

    Returns:
        RGB, `CELL` pixels per patch. Where all patches were kept, the plain square.
    """
    square = _canvas(as_seen(image, aspect_ratio=aspect_ratio, background=background), grid)
    return _paint(square, fate(reduced, index), grid, tint=True)


def spotlight(square: Image.Image, what: Fate, grid: tuple[int, int]) -> Image.Image:
    """Kept patches as they are, everything else darkened."""
    return _paint(_canvas(square, grid), what, grid, tint=False)


def token_colours(what: Fate, grid: tuple[int, int]) -> np.ndarray:
    """[tokens, 3] sRGB in 0..1: the hue says in which direction from the middle of the picture a token sits.

    A token sits on the patch it stands for, else in the middle of the patches that went to it. Neighbours are
    told apart by small steps of hue and lightness.
    """
    rows, columns = grid
    y, x = np.divmod(np.arange(len(what.row)), columns)
    place = np.zeros((what.tokens, 2))
    for token in range(what.tokens):
        own = (what.row == token) & (what.kept if (what.kept & (what.row == token)).any() else True)
        if own.any():
            place[token] = y[own].mean() - (rows - 1) / 2, x[own].mean() - (columns - 1) / 2
    order = np.lexsort((place[:, 1], place[:, 0]))
    step = np.empty(what.tokens)
    step[order] = np.arange(what.tokens) * 0.61803398875 % 1.0 - 0.5  # golden steps: neighbours differ
    angle = np.arctan2(place[:, 0], place[:, 1]) + 0.9 * step
    return _oklch(0.74 + 0.16 * step, 0.13, angle)


def _oklch(lightness: np.ndarray, chroma: float, hue: np.ndarray) -> np.ndarray:
    """Colours of equal chroma in Oklch, a space of even steps to the eye (B. Ottosson, 2020), as sRGB."""
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    lms = np.stack(
        (
            lightness + 0.3963377774 * a + 0.2158037573 * b,
            lightness - 0.1055613458 * a - 0.0638541728 * b,
            lightness - 0.0894841775 * a - 1.2914855480 * b,
        ),
        axis=-1,
    )
    to_rgb = np.array(
        (
            (4.0767416621, -3.3077115913, 0.2309699292),
            (-1.2684380046, 2.6097574011, -0.3413193965),
            (-0.0041960863, -0.7034186147, 1.7076147010),
        )
    )
    linear = np.clip(lms**3 @ to_rgb.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _canvas(square: Image.Image, grid: tuple[int, int]) -> Image.Image:
    rows, columns = grid
    return square.convert("RGB").resize((columns * CELL, rows * CELL), Image.Resampling.LANCZOS)


def _paint(canvas: Image.Image, what: Fate, grid: tuple[int, int], *, tint: bool) -> Image.Image:
    if what.kept.all():
        return canvas
    pixels = np.asarray(canvas, dtype=np.float64) / 255

    def spread(values: np.ndarray) -> np.ndarray:
        """One value per patch -> one per pixel."""
        return values.reshape(*grid, *values.shape[1:]).repeat(CELL, 0).repeat(CELL, 1)

    grey = pixels.mean(-1, keepdims=True)
    if tint:
        colour = token_colours(what, grid)[np.maximum(what.row, 0)]
        merged = spread(colour) * (0.3 + 0.55 * grey)
        rest = np.where(spread(what.merged)[..., None], merged, 0.18 * grey)
    else:
        rest = 0.16 * pixels + 0.1 * grey
    painted = np.where(spread(what.kept)[..., None], pixels, rest)
    picture = Image.fromarray((painted * 255).round().astype(np.uint8))
    _frame(picture, what, grid, tint=tint)
    return picture


def _frame(picture: Image.Image, what: Fate, grid: tuple[int, int], *, tint: bool) -> None:
    """Frames around kept patches; with `tint` in their token's colour, and a line where the token changes."""
    draw = ImageDraw.Draw(picture)
    row = what.row.reshape(grid)
    if tint:
        for y, x in zip(*np.nonzero(row[:, 1:] != row[:, :-1]), strict=True):
            draw.line([((x + 1) * CELL, y * CELL), ((x + 1) * CELL, (y + 1) * CELL)], fill=(20, 22, 25))
        for y, x in zip(*np.nonzero(row[1:] != row[:-1]), strict=True):
            draw.line([(x * CELL, (y + 1) * CELL), ((x + 1) * CELL, (y + 1) * CELL)], fill=(20, 22, 25))
    colours = (token_colours(what, grid) * 255).round().astype(int)
    for patch in np.flatnonzero(what.kept):
        y, x = divmod(int(patch), grid[1])
        edge = tuple(colours[what.row[patch]]) if tint else (255, 255, 255)
        box = (x * CELL, y * CELL, (x + 1) * CELL - 1, (y + 1) * CELL - 1)
        draw.rectangle(box, outline=edge, width=2 if tint else 1)


# The four panels -------------------------------------------------------------------------------------


def figure(
    square: Image.Image, features: VisionFeatures, reduced: ReducedTokens, *, title: str, out: Path
) -> None:
    """Picture, CLS attention with its sorted curve, kept patches, merged patches; written to `out` at once.

    Args:
        square: the picture as the tower sees it.
        features, reduced: of this one picture (B = 1).
        title: stands above the panels.
        out: .png, .pdf or .svg.
    """
    what, grid = fate(reduced), features.grid
    attention = cls_attention(features)[0].double().cpu().numpy() if features.has_cls else None
    side, gap, margin = 3.5, 0.1, 0.15  # inches
    sheet = charts.new_figure(14.6, 6.3, dpi=max(110, grid[1] * CELL / side))
    panels = [
        sheet.add_axes(_box(sheet, margin + column * (side + gap), 1.75, side, side)) for column in range(4)
    ]
    sheet.text(margin / 14.6, 1 - 0.32 / 6.3, title, fontsize=15, fontweight="bold", color=INK, va="center")

    whole = _canvas(square, grid)
    _panel(
        panels[0],
        whole,
        "the picture",
        f"as the tower sees it: {grid[0]} x {grid[1]} = {len(what.row)} patches",
    )
    if attention is None:
        _panel(
            panels[1], whole.convert("L").convert("RGB"), "attention of CLS", "this tower has no CLS token"
        )
    else:
        _heat(panels[1], whole, attention, grid)
        above = _outliers(attention)[1]
        _captions(
            panels[1], "attention of CLS", f"{above} outliers hold {_share(attention, above):.0%} of it"
        )
    _panel(panels[2], spotlight(square, what, grid), "kept", _kept_note(what))
    dropped = int((what.row < 0).sum())
    note = f"{what.merged.sum()} patches tinted by their token" + (f", {dropped} dropped" if dropped else "")
    _panel(panels[3], _paint(whole, what, grid, tint=True), "merged", note)
    if attention is not None:
        _curve(sheet.add_axes(_box(sheet, margin + 0.45, 0.45, 14.3 - 0.45, 1.1)), attention, what)
    charts.save(sheet, out)


def _box(sheet, left: float, bottom: float, width: float, height: float) -> tuple[float, ...]:
    """Inches -> fractions of the figure."""
    across, up = sheet.get_size_inches()
    return left / across, bottom / up, width / across, height / up


def _kept_note(what: Fate) -> str:
    kept = int(what.kept.sum())
    extra = what.tokens - kept
    if not kept:
        return f"no single patch: {extra} new token{'s' * (extra != 1)}"
    return f"{kept} patches" + (f" and {extra} token{'s' * (extra != 1)} for the rest" if extra else "")


def _panel(axes, picture: Image.Image, name: str, note: str) -> None:
    axes.imshow(picture, interpolation="nearest")
    _captions(axes, name, note)


def _captions(axes, name: str, note: str) -> None:
    axes.set_axis_off()
    axes.text(0, 1.075, name, transform=axes.transAxes, fontsize=11.5, color=INK)
    axes.text(0, 1.02, note, transform=axes.transAxes, fontsize=9, color=FAINT)


def _heat(axes, whole: Image.Image, attention: np.ndarray, grid: tuple[int, int]) -> None:
    """Attention on a logarithmic scale over a grey picture: on a linear one only the outliers would show."""
    axes.imshow(whole.convert("L"), cmap="gray", vmin=-90, vmax=330)
    level = np.log(np.maximum(attention, np.finfo(float).tiny))
    low, high = np.quantile(level, (0.02, 1.0))
    strength = np.clip((level - low) / max(high - low, 1e-9), 0, 1).reshape(grid)
    rows, columns = grid
    axes.imshow(
        strength,
        cmap="inferno",
        vmin=0,
        vmax=1,
        alpha=0.25 + 0.65 * strength,
        extent=(-0.5, columns * CELL - 0.5, rows * CELL - 0.5, -0.5),
        interpolation="nearest",
    )


def _outliers(attention: np.ndarray) -> tuple[float, int]:
    """The upper fence, and how many patches lie above it."""
    fence = float(outlier_fence(torch.from_numpy(np.sort(attention)[::-1].copy())))
    return fence, int((attention > fence).sum())


def _share(attention: np.ndarray, count: int) -> float:
    """The part of the patches' attention that the `count` largest hold."""
    return float(np.sort(attention)[::-1][:count].sum() / attention.sum())


def _curve(axes, attention: np.ndarray, what: Fate) -> None:
    """Attention by rank, kept patches marked, with the outlier fence."""
    order = np.argsort(-attention, kind="stable")
    ranks = np.arange(1, len(order) + 1)
    percent = 100 * attention[order]
    is_kept = what.kept[order]
    fence, above = _outliers(attention)
    low, high = 0.8 * np.quantile(percent, 0.02), 1.5 * percent[0]
    axes.bar(ranks, percent, width=1.0, color="#dde1e7", linewidth=0)
    axes.bar(ranks[is_kept], percent[is_kept], width=1.0, color=ACCENT, linewidth=0)
    axes.axhline(100 * fence, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    above_line = {"textcoords": "offset points", "ha": "right", "fontsize": 9}
    note = f"outlier fence, Q3 + 1.5 (Q3 - Q1): {above} patches above"
    axes.annotate(note, (len(order), 100 * fence), (0, 4), color=INK, **above_line)
    if is_kept.any():
        axes.annotate(
            f"kept: {is_kept.sum()}", (len(order), 100 * fence), (0, 19), color=ACCENT, **above_line
        )
    axes.set(xlim=(0.3, len(order) + 0.7), ylim=(low, high), yscale="log")
    axes.set_xlabel("patches, by their attention", fontsize=9, color=FAINT, labelpad=1)
    axes.set_ylabel("% of attention", fontsize=9, color=FAINT, labelpad=1)
    axes.yaxis.set_major_formatter("{x:g}")
    charts.tidy(axes)
    axes.yaxis.set_minor_formatter("")


# The command -----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, help="a picture")
    parser.add_argument(
        "--reducer",
        help="spec, such as prumerge+ or topk(tokens=64) (default: the checkpoint's, else prumerge+)",
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/show.png"), help="default: %(default)s")
    parser.add_argument(
        "--model-path", help="a LLaVA checkpoint: its tower, its way to square a picture, its reducer"
    )
    parser.add_argument("--model-base", help="the base of a LoRA or projector-only checkpoint")
    parser.add_argument("--vision-tower", help="directory of a CLIP or DINOv2 tower (default: the small one)")
    parser.add_argument("--device", help="default: the best there is")


def run(args: argparse.Namespace) -> int:
    charts.check_name(args.out, "--out")
    source = _source(args)
    try:
        reducer = build_reducer(source.reducer if args.reducer is None else args.reducer)
        device = hardware.plan(args.device).device
    except (ReducerSpecError, ValueError) as error:
        raise UserError(str(error)) from error
    image = load_image(args.image)
    tower = load_vision_tower(source.tower, select_layer=source.select_layer, device=device)
    square = as_seen(image, aspect_ratio=source.aspect_ratio, background=mean_colour(tower.image_processor))
    features = see(tower, square)
    try:
        reduced = reducer(features)
    except ReducerInputError as error:
        raise UserError(str(error)) from error
    what = fate(reduced)
    title = (
        f"{reducer.spec}: {what.tokens} of {len(what.row)} visual tokens ({what.tokens / len(what.row):.0%})"
    )
    figure(square, features, reduced, title=title, out=args.out)
    print(title)
    print(args.out)
    return 0


def see(tower: VisionTower, square: Image.Image) -> VisionFeatures:
    """A tower's features of one square picture."""
    pixels = tower.image_processor.preprocess(square, return_tensors="pt")["pixel_values"]
    return tower(pixels)


@dataclass(frozen=True)
class _Source:
    """Where the features come from."""

    tower: Path
    select_layer: int = -2
    aspect_ratio: str | None = "pad"
    reducer: str = "prumerge+"


def _source(args: argparse.Namespace) -> _Source:
    """The tower and settings asked for: a checkpoint's, overridden by --vision-tower; or the small tower."""
    remedy = "--vision-tower PATH"
    if args.model_path is not None:
        info = inspect_checkpoint(
            resolve_directory(args.model_path),
            None
            if args.model_base is None
            else resolve_directory(args.model_base, remedy="--model-base PATH"),
        ).llava_config
        own = str(info.path) if info.kind == "llava_hf" else info.config.get("mm_vision_tower")
        name = args.vision_tower or own
        if name is None:
            raise UserError(
                f"{info.path} has no vision tower (mm_vision_tower in config.json): use {remedy}."
            )
        return _Source(
            tower=resolve_directory(name, beside=info.path, remedy=remedy),
            select_layer=info.config.get("mm_vision_select_layer", -2),
            aspect_ratio=info.config.get("image_aspect_ratio"),
            reducer=info.config.get("mm_token_reducer", "prumerge+"),
        )
    if args.vision_tower is not None:
        return _Source(resolve_directory(args.vision_tower, remedy=remedy))
    if not MINI_TOWER.is_dir():
        raise UserError(f"{MINI_TOWER} is not there: build it with `llava mini prepare`, or give {remedy}.")
    return _Source(MINI_TOWER)
