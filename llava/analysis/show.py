"""`llava show`: what a reducer sees in a picture, what it keeps, and where the rest goes.

Pictures are drawn from two things only: the attention of the CLS row (the sparsity PruMerge rests on) and
where the patches went, as a reducer returns it (`ReducedTokens.kept`, `.source`). So they work for any
reducer, and show what it did rather than what it is said to do.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image

from llava import hardware
from llava.analysis import charts
from llava.analysis.charts import ACCENT, INK
from llava.engine import Look, ModelSource, Request
from llava.errors import UserError
from llava.mm_utils import load_image, process_images
from llava.model.anyres import reduce_views
from llava.model.checkpoints import inspect_checkpoint, resolve_directory
from llava.model.vision_tower import VisionTower, load_vision_tower
from llava.pictures import CELL, Assignment, arrange, canvas, paint, squares, tiles_across
from llava.reducers import ReducedTokens, Reducer, ReducerInputError, VisionFeatures, build_reducer
from llava.reducers.features import TEXT_FIELDS
from llava.reducers.prumerge import outlier_fence
from llava.reducers.scores import patch_scores, score_reads

MINI_TOWER = Path("checkpoints/mini-base/vision_tower")

# The four panels -------------------------------------------------------------------------------------


def figure(
    views: Sequence[Image.Image],
    features: VisionFeatures,
    reduced: Sequence[ReducedTokens],
    across: int = 1,
    *,
    title: str,
    out: Path,
) -> None:
    """Picture, CLS attention with its sorted curve, kept patches, merged patches; written to `out` at once.

    Args:
        views: what the tower sees: the picture, and for anyres its tiles.
        features: of all views.
        reduced: of each view, B = 1.
        across: tiles beside one another.
        title: stands above the panels.
        out: .png, .pdf or .svg.
    """
    grid, patches = features.grid, [Assignment.of(one) for one in reduced]
    whole = [canvas(view, grid) for view in views]
    grey = [Image.merge("RGB", [picture.convert("L")] * 3) for picture in whole]
    drawn = {
        "picture": whole,
        "attention": grey,
        "kept": [paint(*one, grid, tint=False) for one in zip(whole, patches, strict=True)],
        "merged": [paint(*one, grid, tint=True) for one in zip(whole, patches, strict=True)],
    }
    noted = "this tower has no CLS token"
    if features.has_cls:
        attention = patch_scores(features).double().cpu().numpy()  # [views, N]
        drawn["attention"], noted = _heat(grey, attention, grid)
    total, tokens = sum(len(one.row) for one in patches), sum(one.tokens for one in patches)
    kept = sum(int(one.kept.sum()) for one in patches)
    dropped = sum(int((one.row < 0).sum()) for one in patches)
    new = f"{tokens - kept} token{'s' * (tokens - kept != 1)}"
    tiles, times = (f" and in {len(views) - 1} tiles", f"{len(views)} x ") if len(views) > 1 else ("", "")
    notes = {
        "picture": f"as the tower sees it{tiles}: {times}{grid[0]} x {grid[1]} = {total} patches",
        "attention": noted,
        "kept": f"{kept} patches" + f" and {new} for the rest" * (tokens > kept),
        "merged": f"{total - kept - dropped} patches tinted by their token"
        + f", {dropped} dropped" * (dropped > 0),
    }
    if not kept:
        notes["kept"] = f"no single patch: {new}"

    sheets = {name: arrange(pictures, across) for name, pictures in drawn.items()}
    width, height = sheets["picture"].size
    rows = [list(notes)] if len(views) == 1 else [["picture", "attention"], ["kept", "merged"]]
    inches = 14.6 / len(rows[0])  # of a panel
    heights = [inches * height / width + 0.4] * len(rows)
    if features.has_cls:
        rows, heights = [*rows, ["curve"] * len(rows[0])], [*heights, 1.7]
    dpi = min(max(110, width / inches), 190)
    sheet = charts.new_figure(14.6, sum(heights) + 0.4, dpi=dpi, layout="constrained")
    axes = sheet.subplot_mosaic(rows, height_ratios=heights)
    for name, note in notes.items():
        axes[name].imshow(sheets[name])
        axes[name].set_axis_off()
        axes[name].set_title(f"{name}: {note}", loc="left", fontsize=9, color=INK)
    if features.has_cls:
        _curve(axes["curve"], attention[0], patches[0])
    sheet.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold", color=INK)
    charts.save(sheet, out)


def _heat(
    grey: Sequence[Image.Image], attention: np.ndarray, grid: tuple[int, int]
) -> tuple[list[Image.Image], str]:
    """Attention [views, N] over grey pictures, on a logarithmic scale: a linear one would show outliers only.

    Returns the pictures, and how many patches are outliers with what part of the attention they hold.
    """
    level = np.log(np.maximum(attention, np.finfo(float).tiny))
    low, high = np.quantile(level, (0.02, 1.0))
    strength = np.clip((level - low) / max(high - low, 1e-9), 0, 1)
    painted = []
    for picture, values in zip(grey, strength.reshape(-1, *grid, 1), strict=True):
        values = values.repeat(CELL, 0).repeat(CELL, 1)
        alpha = 0.25 + 0.65 * values
        colour = 255 * matplotlib.colormaps["inferno"](values[..., 0])[..., :3]
        faint = 55 + 0.6 * np.asarray(picture)
        painted.append(Image.fromarray((alpha * colour + (1 - alpha) * faint).round().astype(np.uint8)))
    above = [one[one > _fence(one)] for one in attention]
    share = sum(one.sum() for one in above) / attention.sum()
    return painted, f"{sum(map(len, above))} outliers hold {share:.0%} of it"


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
    axes.set(yscale="log", xlabel="patches of the whole picture, by their attention", ylabel="% of attention")
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
    parser.add_argument("--model-base", help="base of a LoRA; read only for reducers that need the projector")
    parser.add_argument("--question", help="for reducers that read it")
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
    names = {"image_aspect_ratio": None, "image_grid_pinpoints": None, "mm_anyres_budget": "tile"}
    own = SimpleNamespace(**names | config)
    if {"projected", *TEXT_FIELDS} & set(reducer.reads):
        look, processor = _through_the_model(args, reducer)
    else:
        tower = load_vision_tower(path, select_layer=config.get("mm_vision_select_layer", -2), device=device)
        look, processor = _through_the_tower(args.image, tower, reducer, own), tower.image_processor
    tokens, patches = sum(int(one.lengths) for one in look.reduced), look.features.patches[..., 0].numel()
    title = f"{reducer.spec}: {tokens} of {patches} visual tokens ({tokens / patches:.0%})"
    across = tiles_across(look.size, look.pixels, own) if len(look.pixels) > 1 else 1
    figure(squares(look.pixels, processor), look.features, look.reduced, across, title=title, out=args.out)
    print(title)
    print(args.out)
    return 0


def _through_the_tower(file: Path, tower: VisionTower, reducer: Reducer, config: Any) -> Look:
    """What the reducer keeps, with no more than the vision tower in memory."""
    image = load_image(file)
    pixels: Any = process_images([image], tower.image_processor, config)
    pixels = pixels.flatten(0, -4)  # [views, 3, S, S]
    shared = score_reads(None) if config.mm_anyres_budget == "shared" else ()
    features = tower(pixels, {*reducer.asks, *shared})
    try:
        reduced = reduce_views(reducer, features, [len(pixels)], config.mm_anyres_budget)
    except ReducerInputError as error:
        raise UserError(str(error)) from error
    return Look(pixels, image.size, features, reduced)


def _through_the_model(args: argparse.Namespace, reducer: Reducer) -> tuple[Look, Any]:
    """The same for reducers that read projected patches or the question; the image processor."""
    if args.model_path is None:
        raise UserError(f"{reducer.name} reads more than a vision tower tells: give --model-path.")
    if reducer.reads_question and args.question is None:
        raise UserError(f"{reducer.name} reads the question: give --question.")
    engine = ModelSource(
        args.model_path,
        args.model_base,
        reducer=args.reducer,
        vision_tower=args.vision_tower,
        device=args.device or "cuda",
    ).load()
    return engine.look(args.image, Request(text=args.question or "")), engine.image_processor


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
