"""`llava roofline`: tables of what fewer visual tokens can save on a GPU; no torch, no GPU.

`--paper` recomputes the efficiency table of the PruMerge paper by its own accounting (`paper_table.py`); all
else goes by ours (`roofline.py`).
"""

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence

from llava.analysis import gpus, paper_table, tables
from llava.analysis.roofline import (
    PRECISIONS,
    Precision,
    Request,
    break_even,
    estimate,
    prefill_operators,
    request,
)
from llava.analysis.shapes import SHAPES, Shape
from llava.errors import UserError

SWEEP = (576, 144, 64, 40, 32)
STAGES = ("vision", "reduce", "project", "prefill")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--paper", action="store_true", help="recompute the paper's efficiency table, as it was made"
    )
    parser.add_argument("--gpu", help="a card of the table (default: all of them)")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="model (default: %(default)s)")
    parser.add_argument("--text", type=int, default=40, help="text tokens (default: %(default)s)")
    parser.add_argument(
        "--visual", type=int, nargs="+", default=[144, 32], help="visual tokens kept (default: 144 32)"
    )
    parser.add_argument("--batch", type=int, default=1, help="requests at once (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    if args.paper:
        return _run_paper(args.json)
    for name in ("text", "batch"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    shape, precision = SHAPES[args.shape], PRECISIONS[args.precision]
    if any(not 0 < visual <= shape.tower.patches for visual in args.visual):
        raise UserError(f"--visual must lie between 1 and {shape.tower.patches}, the patches of the tower.")
    if args.gpu is None:
        return _run_all_gpus(shape, precision, args)
    try:
        gpu = gpus.find_gpu(args.gpu)
    except ValueError as error:
        raise UserError(str(error)) from error
    if precision.name == "bf16" and gpu.capability < gpus.AMPERE:
        raise UserError(f"The {gpu.name} has no bfloat16 arithmetic: use --precision fp16.")
    counts = dict.fromkeys((shape.tower.patches, *args.visual))  # all of them first, each once
    rows = [
        request(shape, gpu, precision, text=args.text, visual=visual, batch=args.batch) for visual in counts
    ]
    return _run_gpu(rows, shape, gpu, precision, args)


def _run_paper(as_json: bool) -> int:
    rows = paper_table.compute()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    figures = ("TFLOP", "prefill ms", "memory GB", "activation GB")
    header = ("row", *(name for figure in figures for name in (figure, "printed")))
    cells = []
    for row in rows:
        computed = (
            f"{row.tflops:.4g}",
            f"{row.prefill_ms:.4g}",
            f"{row.memory_gb:.4g}",
            f"{row.activation_gb:.3g}",
        )
        pairs = zip(computed, paper_table.PRINTED[row.row], strict=True)
        cells.append((row.row, *(cell for pair in pairs for cell in pair)))
    print(tables.render(header, cells))
    print()
    for remark in paper_table.REMARKS:
        print(textwrap.fill(remark, 100, initial_indent="- ", subsequent_indent="  "))
    return 0


def _run_all_gpus(shape: Shape, precision: Precision, args: argparse.Namespace) -> int:
    """Prefill on every card."""
    cards = [gpu for gpu in gpus.GPUS if precision.name != "bf16" or gpu.capability >= gpus.AMPERE]
    counts = [visual for visual in SWEEP if visual <= shape.tower.patches]
    language = shape.language
    prefill = {
        gpu.name: [
            estimate(prefill_operators(language, args.text + visual, args.batch, precision), gpu).ms
            for visual in counts
        ]
        for gpu in cards
    }
    if args.json:
        rows = [
            {
                **dataclasses.asdict(gpu),
                "prefill_ms": dict(zip(map(str, counts), prefill[gpu.name], strict=True)),
                "break_even_tokens": break_even(gpu, precision),
            }
            for gpu in cards
        ]
        print(json.dumps({**_settings(shape, precision, args), "gpus": rows}, indent=2))
        return 0
    print(f"Prefill, ms: {_describe(shape, precision, args)}")
    header = ("GPU", "GB/s", "TFLOP/s", *(f"{visual} visual" for visual in counts), "break-even", "source")
    rates = {gpu.name: getattr(gpu, precision.rate) / 1e12 for gpu in cards}
    rows = [
        (
            gpu.name,
            f"{gpu.bandwidth / 1e9:.0f}",
            f"{rates[gpu.name]:.1f}",
            *(f"{ms:.1f}" for ms in prefill[gpu.name]),
            f"{break_even(gpu, precision):.0f}",
            gpu.source,
        )
        for gpu in cards
    ]
    print(tables.render(header, rows, left=(0, len(header) - 1)))
    print("break-even: tokens in flight (text + visual, times batch) below which fewer tokens save no time")
    return 0


def _run_gpu(
    rows: Sequence[Request], shape: Shape, gpu: gpus.Gpu, precision: Precision, args: argparse.Namespace
) -> int:
    dense = rows[0]
    tokens = break_even(gpu, precision)
    visual = max(tokens / args.batch - args.text, 0.0)
    if args.json:
        settings = {
            **_settings(shape, precision, args),
            "gpu": dataclasses.asdict(gpu),
            "break_even_tokens": tokens,
            "break_even_visual": visual,
        }
        print(json.dumps({**settings, "rows": [_as_json(row, dense) for row in rows]}, indent=2))
        return 0
    print(f"{gpu.name} ({gpu.bandwidth / 1e9:.0f} GB/s; {gpu.source}): {_describe(shape, precision, args)}")
    header = ("visual", *STAGES, "first token", "speed-up", "decode/token", "KV MB", "prefill bound by")
    cells = [
        (
            str(row.visual),
            *(f"{getattr(row, stage).ms:.2f}" for stage in STAGES),
            f"{row.first_token_ms:.2f}",
            f"{dense.first_token_ms / row.first_token_ms:.2f}x",
            f"{row.decode.ms:.2f}",
            f"{row.kv_gb * 1e3:.0f}",
            f"{row.prefill.bound} {max(row.prefill.bytes_share, 1 - row.prefill.bytes_share):.0%}",
        )
        for row in rows
    ]
    print(tables.render(header, cells))
    print("All times in ms, for the whole batch.\n")
    gain = (
        "every visual token saved is time saved"
        if visual < 1
        else f"going below {visual:.0f} visual tokens gains nothing"
    )
    print(
        f"Weights take as long to read as to use at {tokens:.0f} tokens in flight "
        f"(text + visual, times batch):\nwith {args.text} text tokens at batch {args.batch}, {gain}."
    )
    shortest = min(rows, key=lambda row: row.visual)
    print(
        f"The tower is not reduced: {dense.vision.ms / dense.first_token_ms:.0%} of the dense run, "
        f"{shortest.vision.ms / shortest.first_token_ms:.0%} of the run with {shortest.visual} visual tokens."
    )
    needed = dense.weights_gb + dense.kv_gb
    fit = "fit" if needed < gpu.memory_gb else "DO NOT fit"
    print(
        f"Weights {dense.weights_gb:.1f} GB and dense KV {dense.kv_gb:.2f} GB {fit} into {gpu.memory_gb} GB."
    )
    return 0


def _as_json(row: Request, dense: Request) -> dict:
    stages = {
        stage: {**dataclasses.asdict(part), "bound": part.bound}
        for stage in (*STAGES, "decode")
        for part in (getattr(row, stage),)
    }
    return {
        "visual": row.visual,
        **stages,
        "first_token_ms": row.first_token_ms,
        "prefill_speedup": dense.prefill.ms / row.prefill.ms,
        "first_token_speedup": dense.first_token_ms / row.first_token_ms,
        "kv_gb": row.kv_gb,
        "weights_gb": row.weights_gb,
    }


def _settings(shape: Shape, precision: Precision, args: argparse.Namespace) -> dict:
    return {"shape": shape.name, "precision": precision.name, "text": args.text, "batch": args.batch}


def _describe(shape: Shape, precision: Precision, args: argparse.Namespace) -> str:
    return f"{shape.name}, {precision.name}, {args.text} text tokens, batch {args.batch}"
