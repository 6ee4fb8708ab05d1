"""`llava roofline`: tables and plots of what fewer visual tokens can save on a GPU; no torch, no GPU.

`--paper` recomputes the efficiency table of the PruMerge paper by its own accounting (`paper_table.py`); all
else goes by ours (`roofline.py`).
"""

import argparse
import dataclasses
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

from llava import hardware
from llava.analysis import charts, paper_table, scaling, tables
from llava.analysis.roofline import (
    PRECISIONS,
    Precision,
    Request,
    break_even,
    capacity,
    estimate,
    prefill_operators,
    request,
)
from llava.analysis.shapes import SHAPES, Shape
from llava.errors import UserError

SWEEP = (576, 144, 64, 40, 32)


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
    parser.add_argument(
        "--plot", type=Path, help="with --gpu: draw how time and memory grow (.png, .svg, .pdf)"
    )
    plan = parser.add_argument_group("capacity, with --gpu")
    plan.add_argument("--questions", type=int, help="how long so many questions take")
    plan.add_argument("--gpus", type=int, default=8, help="cards that share them (default: %(default)s)")
    plan.add_argument("--answer", type=int, default=4, help="tokens of an answer (default: %(default)s)")
    plan.add_argument(
        "--questions-per-image", type=float, default=1.0, help="each picture is encoded once (default: 1)"
    )
    plan.add_argument(
        "--efficiency",
        type=float,
        default=0.5,
        help="part of the roofline's speed reached (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    if args.paper:
        return _run_paper(args.json)
    for name in ("text", "batch", "gpus", "answer"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    for name in ("efficiency", "questions_per_image"):
        if getattr(args, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {getattr(args, name)}.")
    shape, precision = SHAPES[args.shape], PRECISIONS[args.precision]
    if any(not 0 < visual <= shape.tower.patches for visual in args.visual):
        raise UserError(f"--visual must lie between 1 and {shape.tower.patches}, the patches of the tower.")
    if args.gpu is None:
        if args.questions or args.plot:
            raise UserError("--questions and --plot need a --gpu.")
        return _run_sweep(shape, precision, args)
    try:
        gpu = hardware.find_gpu(args.gpu)
    except ValueError as error:
        raise UserError(str(error)) from error
    if precision.name == "bf16" and gpu.capability < hardware.AMPERE:
        raise UserError(f"The {gpu.name} has no bfloat16 arithmetic: use --precision fp16.")
    if args.plot:
        charts.check_name(args.plot, "--plot")
        scaling.draw(shape, gpu, precision, args.text, args.plot)
        print(args.plot)
        return 0
    counts = [shape.tower.patches, *(visual for visual in args.visual if visual != shape.tower.patches)]
    rows = [
        request(shape, gpu, precision, text=args.text, visual=visual, batch=args.batch) for visual in counts
    ]
    if args.questions:
        return _run_capacity(rows, shape, gpu, precision, args)
    return _run_gpu(rows, shape, gpu, precision, args)


def _run_paper(as_json: bool) -> int:
    rows = paper_table.compute()
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
        return 0
    header = (
        "row",
        "TFLOP",
        "printed",
        "prefill ms",
        "printed",
        "memory GB",
        "printed",
        "activation GB",
        "printed",
    )
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


def _run_sweep(shape: Shape, precision: Precision, args: argparse.Namespace) -> int:
    """Prefill on every card."""
    cards = [gpu for gpu in hardware.GPUS if precision.name != "bf16" or gpu.capability >= hardware.AMPERE]
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
    rows: Sequence[Request], shape: Shape, gpu: hardware.Gpu, precision: Precision, args: argparse.Namespace
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
    print(_break_even_sentence(tokens, visual, args))
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


def _break_even_sentence(tokens: float, visual: float, args: argparse.Namespace) -> str:
    gain = (
        "every visual token saved is time saved"
        if visual < 1
        else f"going below {visual:.0f} visual tokens gains nothing"
    )
    return (
        f"Weights take as long to read as to use at {tokens:.0f} tokens in flight "
        "(text + visual, times batch):\n"
        f"with {args.text} text tokens at batch {args.batch}, {gain}."
    )


def _run_capacity(
    rows: Sequence[Request], shape: Shape, gpu: hardware.Gpu, precision: Precision, args: argparse.Namespace
) -> int:
    plans = [
        capacity(
            row,
            batch=args.batch,
            questions=args.questions,
            gpus=args.gpus,
            answer=args.answer,
            images_per_question=1 / args.questions_per_image,
            efficiency=args.efficiency,
        )
        for row in rows
    ]
    if args.json:
        settings = {
            **_settings(shape, precision, args),
            "gpu": dataclasses.asdict(gpu),
            "questions": args.questions,
            "gpus": args.gpus,
            "answer": args.answer,
            "questions_per_image": args.questions_per_image,
            "efficiency": args.efficiency,
        }
        print(json.dumps({**settings, "rows": [dataclasses.asdict(plan) for plan in plans]}, indent=2))
        return 0
    print(
        f"{args.questions} questions on {args.gpus} x {gpu.name}, answers of {args.answer} tokens, "
        f"{args.questions_per_image:g} questions per encoded image, "
        f"{args.efficiency:.0%} of the roofline's speed: {_describe(shape, precision, args)}"
    )
    dense = plans[0]
    cells = [
        (
            str(plan.visual),
            f"{plan.seconds_per_batch:.3f}",
            f"{args.batch / plan.seconds_per_batch:.1f}",
            f"{plan.minutes:.1f}",
            f"{dense.minutes / plan.minutes:.2f}x",
        )
        for plan in plans
    ]
    print(tables.render(("visual", "s per batch", "questions/s per GPU", "minutes", "speed-up"), cells))
    return 0


STAGES = ("vision", "reduce", "project", "prefill")


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
