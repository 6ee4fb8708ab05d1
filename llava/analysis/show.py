"""`llava show`: what a reducer sees in a picture, what it keeps, and where the rest goes.

Pictures are drawn from two things only: the attention of the CLS row (the sparsity PruMerge rests on) and
where the patches went, as a reducer returns it (`ReducedTokens.kept`, `.source`). So they work for any
reducer, and show what it did rather than what it is said to do.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from llava import hardware
from llava.analysis import charts
from llava.analysis.charts import ACCENT, INK
from llava.errors import UserError
from llava.mm_utils import load_image, mean_colour
from llava.model.checkpoints import inspect_checkpoint, resolve_directory
from llava.model.vision_tower import load_vision_tower
from llava.pictures import CELL, Assignment, as_seen, canvas, paint
from llava.reducers import ReducedTokens, ReducerInputError, VisionFeatures, build_reducer
from llava.reducers.prumerge import outlier_fence
from llava.reducers.scores import patch_scores

MINI_TOWER = Path("checkpoints/mini-base/vision_tower")

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
    patches, grid = Assignment.of(reduced), features.grid
    whole = canvas(square, grid)
    rows = [["picture", "attention", "kept", "merged"]]
    sheet = charts.new_figure(14.6, 6.3, dpi=max(110, grid[1] * CELL / 3.5), layout="constrained")
    if features.has_cls:
        axes = sheet.subplot_mosaic([*rows, ["curve"] * 4], height_ratios=(3.5, 1.1))
        attention = patch_scores(features)[0].double().cpu().numpy()
        noted = _heat(axes["attention"], whole, attention, grid)
        _curve(axes["curve"], attention, patches)
    else:
        axes = sheet.subplot_mosaic(rows)
        axes["attention"].imshow(whole.convert("L"), cmap="gray", vmin=0, vmax=255)
        noted = "this tower has no CLS token"

    kept, dropped = int(patches.kept.sum()), int((patches.row < 0).sum())
    new = f"{patches.tokens - kept} token{'s' * (patches.tokens - kept != 1)}"
    notes = {
        "picture": f"as the tower sees it: {grid[0]} x {grid[1]} = {len(patches.row)} patches",
        "attention": noted,
        "kept": f"{kept} patches" + f" and {new} for the rest" * (patches.tokens > kept),
        "merged": f"{patches.merged.sum()} patches tinted by their token"
        + f", {dropped} dropped" * (dropped > 0),
    }
    if not kept:
        notes["kept"] = f"no single patch: {new}"
    axes["picture"].imshow(whole)
    axes["kept"].imshow(paint(whole, patches, grid, tint=False), interpolation="nearest")
    axes["merged"].imshow(paint(whole, patches, grid, tint=True), interpolation="nearest")
    for name, note in notes.items():
        axes[name].set_axis_off()
        axes[name].set_title(f"{name}: {note}", loc="left", fontsize=9, color=INK)
    sheet.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold", color=INK)
    charts.save(sheet, out)


def _heat(axes: Any, whole: Image.Image, attention: np.ndarray, grid: tuple[int, int]) -> str:
    """Attention over a grey picture, on a logarithmic scale: on a linear one only the outliers would show.

    Returns how many patches are outliers, and what part of the attention they hold.
    """
    axes.imshow(whole.convert("L"), cmap="gray", vmin=-90, vmax=330)
    level = np.log(np.maximum(attention, np.finfo(float).tiny))
    low, high = np.quantile(level, (0.02, 1.0))
    strength = np.clip((level - low) / max(high - low, 1e-9), 0, 1).reshape(grid)
    edges = (-0.5, whole.width - 0.5, whole.height - 0.5, -0.5)
    axes.imshow(strength, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.65 * strength, extent=edges)
    outliers = attention[attention > _fence(attention)]
    return f"{len(outliers)} outliers hold {outliers.sum() / attention.sum():.0%} of it"


def _fence(attention: np.ndarray) -> float:
    return float(outlier_fence(torch.from_numpy(np.sort(attention)[::-1].copy())))


def _curve(axes: Any, attention: np.ndarray, patches: Assignment) -> None:
    """Attention by rank, kept patches marked, with the outlier fence."""
    order = np.argsort(-attention, kind="stable")
    ranks, percent, is_kept = np.arange(1, len(order) + 1), 100 * attention[order], patches.kept[order]
    fence = 100 * _fence(attention)
    axes.bar(ranks, percent, width=1.0, color="#dde1e7", linewidth=0)
    axes.bar(ranks[is_kept], percent[is_kept], width=1.0, color=ACCENT, linewidth=0, label="kept")
    note = f"outlier fence, Q3 + 1.5 (Q3 - Q1): {(percent > fence).sum()} patches above"
    axes.axhline(fence, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label=note)
    axes.set(xlim=(0.3, len(order) + 0.7), ylim=(0.8 * np.quantile(percent, 0.02), 1.5 * percent[0]))
    axes.set(yscale="log", xlabel="patches, by their attention", ylabel="% of attention")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(loc="center right", frameon=False, fontsize=9)
    charts.tidy(axes)


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
    parser.add_argument("--vision-tower", help="directory of a CLIP or DINOv2 tower (default: the small one)")
    parser.add_argument("--device", help="default: the best there is")


def run(args: argparse.Namespace) -> int:
    charts.check_name(args.out, "--out")
    path, config = _tower_and_config(args)
    try:
        recorded = config.get("mm_token_reducer", "prumerge+")
        reducer = build_reducer(args.reducer or recorded, allow_files=args.reducer is not None)
        device = hardware.plan(args.device).device
    except ValueError as error:
        raise UserError(str(error)) from error
    image = load_image(args.image)
    tower = load_vision_tower(path, select_layer=config.get("mm_vision_select_layer", -2), device=device)
    square = as_seen(image, config.get("image_aspect_ratio"), mean_colour(tower.image_processor))
    processor: Any = tower.image_processor
    pixels = processor.preprocess(square, return_tensors="pt")["pixel_values"]
    features = tower(pixels, reducer.asks)
    try:
        reduced = reducer(features)
    except ReducerInputError as error:
        raise UserError(str(error)) from error
    tokens, patches = int(reduced.lengths[0]), reduced.source.shape[1]
    title = f"{reducer.spec}: {tokens} of {patches} visual tokens ({tokens / patches:.0%})"
    figure(square, features, reduced, title=title, out=args.out)
    print(title)
    print(args.out)
    return 0


def _tower_and_config(args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The tower asked for, and the config of the checkpoint it stands in: the defaults without one."""
    remedy = "--vision-tower PATH"
    config: dict[str, Any] = {"image_aspect_ratio": "pad"}
    name, beside = args.vision_tower or MINI_TOWER, None
    if args.model_path is not None:
        info = inspect_checkpoint(resolve_directory(args.model_path))
        config, beside = info.config, info.path
        own = str(info.path) if info.kind == "llava_hf" else config.get("mm_vision_tower")
        name = args.vision_tower or own
        if name is None:
            raise UserError(
                f"{info.path} has no vision tower (mm_vision_tower in config.json): use {remedy}."
            )
    elif name == MINI_TOWER and not MINI_TOWER.is_dir():
        raise UserError(f"{MINI_TOWER} is not there: build it with `llava mini prepare`, or give {remedy}.")
    return resolve_directory(str(name), beside=beside, remedy=remedy), config
