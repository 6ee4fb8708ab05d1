"""`llava roofline`: tables of what fewer visual tokens can save on a GPU; no torch, no GPU.

`--paper` recomputes the efficiency table of the PruMerge paper by its own accounting (`paper_table.py`); all
else goes by ours (`roofline.py`).
"""

import argparse
import json
import textwrap
from dataclasses import asdict

from llava.analysis import gpus, paper_table, tables
from llava.analysis.roofline import PRECISIONS, break_even, decoder_operators, estimate, request
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
    if not args.paper:
        if min(args.text, args.batch) < 1:
            raise UserError("--text and --batch must be at least 1.")
        patches = SHAPES[args.shape].tower.patches
        if not 0 < min(args.visual) <= max(args.visual) <= patches:
            raise UserError(f"--visual must lie between 1 and {patches}, the patches of the tower.")
        args.visual = list(dict.fromkeys((patches, *args.visual)))  # all of them first, each once
    report, text = _paper() if args.paper else _all_gpus(args) if args.gpu is None else _one_gpu(args)
    print(json.dumps(report, indent=2) if args.json else text)
    return 0


# Each returns what to print as JSON, and as text.


def _paper() -> tuple[list[dict], str]:
    rows = [asdict(row) for row in paper_table.compute()]
    cells = []
    for row in rows:
        name, *computed = row.values()
        pairs = zip((f"{value:.4g}" for value in computed), paper_table.PRINTED[name], strict=True)
        cells.append((name, *(cell for pair in pairs for cell in pair)))
    figures = ("TFLOP", "prefill ms", "memory GB", "activation GB")
    table = tables.render(("row", *(name for figure in figures for name in (figure, "printed"))), cells)
    remarks = [
        textwrap.fill(remark, 100, initial_indent="- ", subsequent_indent="  ")
        for remark in paper_table.REMARKS
    ]
    return rows, "\n".join((table, "", *remarks))


def _settings(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in ("shape", "precision", "text", "batch")}


def _describe(args: argparse.Namespace) -> str:
    return f"{args.shape}, {args.precision}, {args.text} text tokens, batch {args.batch}"


def _all_gpus(args: argparse.Namespace) -> tuple[dict, str]:
    """Prefill on every card."""
    language, width = SHAPES[args.shape].language, PRECISIONS[args.precision]
    lengths = [args.text + visual for visual in args.visual]
    operators = [decoder_operators(language, n, n, args.batch, width) for n in lengths]
    rows, cells = [], []
    for gpu in gpus.GPUS:
        times, tokens = [estimate(each, gpu).ms for each in operators], break_even(gpu, width)
        prefill = {str(visual): ms for visual, ms in zip(args.visual, times, strict=True)}
        rows.append({**asdict(gpu), "prefill_ms": prefill, "break_even_tokens": tokens})
        rates = f"{gpu.bandwidth / 1e9:.0f}", f"{gpu.half / 1e12:.1f}"
        cells.append((gpu.name, *rates, *(f"{ms:.1f}" for ms in times), f"{tokens:.0f}", gpu.source))
    header = ("GPU", "GB/s", "TFLOP/s", *(f"{n} visual" for n in args.visual), "break-even", "source")
    text = (
        f"Prefill, ms: {_describe(args)}\n{tables.render(header, cells, left=(0, len(header) - 1))}\n"
        "break-even: tokens in flight (text + visual, times batch) below which fewer tokens save no time"
    )
    return {**_settings(args), "gpus": rows}, text


def _one_gpu(args: argparse.Namespace) -> tuple[dict, str]:
    """All stages of a request on one card."""
    try:
        gpu = gpus.find_gpu(args.gpu)
    except ValueError as error:
        raise UserError(str(error)) from error
    how = {"text": args.text, "batch": args.batch, "width": PRECISIONS[args.precision]}
    requests = [request(SHAPES[args.shape], gpu, visual=visual, **how) for visual in args.visual]
    dense, few = requests[0], min(requests, key=lambda each: each.visual)
    tokens = break_even(gpu, how["width"])
    visual = max(tokens / args.batch - args.text, 0.0)
    rows, cells = [], []
    for each in requests:
        first, speedup = each.first_token_ms, dense.first_token_ms / each.first_token_ms
        speedups = {"prefill_speedup": dense.prefill.ms / each.prefill.ms, "first_token_speedup": speedup}
        rows.append({**asdict(each), "first_token_ms": first, **speedups})
        stages = (f"{getattr(each, stage).ms:.2f}" for stage in STAGES)
        rest = f"{each.decode.ms:.2f}", f"{each.kv_gb * 1e3:.0f}", f"{each.prefill.bytes_share:.0%}"
        cells.append((str(each.visual), *stages, f"{first:.2f}", f"{speedup:.2f}x", *rest))
    header = ("visual", *STAGES, "first token", "speed-up", "decode/token", "KV MB", "prefill memory-bound")
    gain = f"going below {visual:.0f} visual tokens gains nothing"
    if visual < 1:
        gain = "every visual token saved is time saved"
    fit = "fit" if dense.weights_gb + dense.kv_gb < gpu.memory_gb else "DO NOT fit"
    text = (
        f"{gpu.name} ({gpu.bandwidth / 1e9:.0f} GB/s; {gpu.source}): {_describe(args)}\n"
        f"{tables.render(header, cells)}\nAll times in ms, for the whole batch.\n\n"
        f"Weights take as long to read as to use at {tokens:.0f} tokens in flight "
        f"(text + visual, times batch):\nwith {args.text} text tokens at batch {args.batch}, {gain}.\n"
        f"The tower is not reduced: {dense.vision.ms / dense.first_token_ms:.0%} of the dense run, "
        f"{few.vision.ms / few.first_token_ms:.0%} of the run with {few.visual} visual tokens.\n"
        f"Weights {dense.weights_gb:.1f} GB and dense KV {dense.kv_gb:.2f} GB {fit} into {gpu.memory_gb} GB."
    )
    report = {"gpu": asdict(gpu), "break_even_tokens": tokens, "break_even_visual": visual, "rows": rows}
    return {**_settings(args), **report}, text
