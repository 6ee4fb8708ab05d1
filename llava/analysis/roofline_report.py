"""`llava roofline`: tables of what fewer visual tokens can save on a GPU; no torch, no GPU.

`--paper` recomputes the efficiency table of the PruMerge paper by its own accounting (`paper_table.py`); all
else goes by ours (`roofline.py`).
"""

import argparse
import json
import textwrap
from dataclasses import asdict

from llava.analysis import gpus, paper_table, tables
from llava.analysis.roofline import PRECISIONS, break_even, estimate, prefill_operators, request
from llava.analysis.shapes import SHAPES
from llava.errors import UserError

STAGES = ("vision", "reduce", "project", "prefill")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--paper", action="store_true", help="recompute the paper's efficiency table, as it was made"
    )
    parser.add_argument("--gpu", help="a card of the table (default: all of them)")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="model (default: %(default)s)")
    parser.add_argument("--text", type=int, default=40, help="text tokens (default: %(default)s)")
    parser.add_argument(
        "--visual", type=int, nargs="+", default=[144, 64, 40, 32], help="visual tokens kept, beside all"
    )
    parser.add_argument("--batch", type=int, default=1, help="requests at once (default: %(default)s)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp16", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def run(args: argparse.Namespace) -> int:
    if args.paper:
        return _run_paper(args)
    if min(args.text, args.batch) < 1:
        raise UserError("--text and --batch must be at least 1.")
    patches = SHAPES[args.shape].tower.patches
    if not 0 < min(args.visual) <= max(args.visual) <= patches:
        raise UserError(f"--visual must lie between 1 and {patches}, the patches of the tower.")
    args.visual = list(dict.fromkeys((patches, *args.visual)))  # all of them first, each once
    return _run_all_gpus(args) if args.gpu is None else _run_gpu(args)


def _run_paper(args: argparse.Namespace) -> int:
    rows = paper_table.compute()
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
        return 0
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
    figures = ("TFLOP", "prefill ms", "memory GB", "activation GB")
    print(tables.render(("row", *(name for figure in figures for name in (figure, "printed"))), cells))
    print()
    for remark in paper_table.REMARKS:
        print(textwrap.fill(remark, 100, initial_indent="- ", subsequent_indent="  "))
    return 0


def _settings(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("shape", "precision", "text", "batch")}


def _describe(args: argparse.Namespace) -> str:
    return f"{args.shape}, {args.precision}, {args.text} text tokens, batch {args.batch}"


def _run_all_gpus(args: argparse.Namespace) -> int:
    """Prefill on every card."""
    language, width = SHAPES[args.shape].language, PRECISIONS[args.precision]
    operators = {n: prefill_operators(language, args.text + n, args.batch, width) for n in args.visual}
    rows = [
        {
            **asdict(gpu),
            "prefill_ms": {str(visual): estimate(ops, gpu).ms for visual, ops in operators.items()},
            "break_even_tokens": break_even(gpu, width),
        }
        for gpu in gpus.GPUS
    ]
    if args.json:
        print(json.dumps({**_settings(args), "gpus": rows}, indent=2))
        return 0
    print(f"Prefill, ms: {_describe(args)}")
    header = ("GPU", "GB/s", "TFLOP/s", *(f"{n} visual" for n in args.visual), "break-even", "source")
    cells = [
        (
            row["name"],
            f"{row['bandwidth'] / 1e9:.0f}",
            f"{row['half'] / 1e12:.1f}",
            *(f"{ms:.1f}" for ms in row["prefill_ms"].values()),
            f"{row['break_even_tokens']:.0f}",
            row["source"],
        )
        for row in rows
    ]
    print(tables.render(header, cells, left=(0, len(header) - 1)))
    print("break-even: tokens in flight (text + visual, times batch) below which fewer tokens save no time")
    return 0


def _run_gpu(args: argparse.Namespace) -> int:
    """All stages of a request on one card."""
    try:
        gpu = gpus.find_gpu(args.gpu)
    except ValueError as error:
        raise UserError(str(error)) from error
    shape, width = SHAPES[args.shape], PRECISIONS[args.precision]
    how = {"text": args.text, "batch": args.batch, "width": width}
    rows = [request(shape, gpu, visual=visual, **how) for visual in args.visual]
    dense, tokens = rows[0], break_even(gpu, width)
    visual = max(tokens / args.batch - args.text, 0.0)
    if args.json:
        report = {
            **_settings(args),
            "gpu": asdict(gpu),
            "break_even_tokens": tokens,
            "break_even_visual": visual,
            "rows": [
                {
                    **asdict(row),
                    "first_token_ms": row.first_token_ms,
                    "prefill_speedup": dense.prefill.ms / row.prefill.ms,
                    "first_token_speedup": dense.first_token_ms / row.first_token_ms,
                }
                for row in rows
            ],
        }
        print(json.dumps(report, indent=2))
        return 0
    print(f"{gpu.name} ({gpu.bandwidth / 1e9:.0f} GB/s; {gpu.source}): {_describe(args)}")
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
    gain = (
        "every visual token saved is time saved"
        if visual < 1
        else f"going below {visual:.0f} visual tokens gains nothing"
    )
    few = min(rows, key=lambda row: row.visual)
    fit = "fit" if dense.weights_gb + dense.kv_gb < gpu.memory_gb else "DO NOT fit"
    print(
        f"All times in ms, for the whole batch.\n\n"
        f"Weights take as long to read as to use at {tokens:.0f} tokens in flight "
        f"(text + visual, times batch):\nwith {args.text} text tokens at batch {args.batch}, {gain}.\n"
        f"The tower is not reduced: {dense.vision.ms / dense.first_token_ms:.0%} of the dense run, "
        f"{few.vision.ms / few.first_token_ms:.0%} of the run with {few.visual} visual tokens.\n"
        f"Weights {dense.weights_gb:.1f} GB and dense KV {dense.kv_gb:.2f} GB {fit} into {gpu.memory_gb} GB."
    )
    return 0
