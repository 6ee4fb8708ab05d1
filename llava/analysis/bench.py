"""`llava bench`: where the time of a request goes, with few visual tokens and with all of them.

`--shape 7b --random-weights` needs no checkpoint. `--prefill 616 184 72` times the language model alone at
these lengths. `--tower` times the vision tower and the reducers alone, beside the forward of all its blocks.
How it is measured: `latency.py`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers

from llava import hardware
from llava.analysis import charts, paper_table, tables
from llava.analysis.latency import (
    DENSE,
    STAGES,
    WARMUP,
    Result,
    Workload,
    interleave,
    measure,
    picture_bytes,
    prefill_flops,
    prompt_ids,
    roofline_prefill,
    run_once,
    summarise,
)
from llava.analysis.random_model import build_model, build_tower
from llava.analysis.shapes import SHAPES
from llava.analysis.stopwatch import CLOCKS, Spread
from llava.engine import ModelSource
from llava.errors import UserError
from llava.files import write_text
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.question import QuestionReader
from llava.reducers import Reducer, ReducerInputError, build_reducer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("model")
    what.add_argument("--model-path", help="a checkpoint")
    what.add_argument("--model-base", help="the base of a LoRA or projector-only checkpoint")
    what.add_argument("--shape", choices=SHAPES, help="instead: a model of this shape with random weights")
    what.add_argument("--random-weights", action="store_true", help="said with --shape, which implies it")
    what.add_argument("--layers", type=int, help="with --shape: only so many decoder layers")
    what.add_argument("--device", help="default: the best there is")
    what.add_argument("--dtype", help="float16, bfloat16 or float32 (default: the device's best)")
    what.add_argument("--attention", help="sdpa, eager, flash_attention_2 (default: the device's best)")
    work = parser.add_argument_group("requests")
    work.add_argument(
        "--reducer",
        nargs="+",
        default=["prumerge+(tokens=144)", "prumerge(tokens=32)"],
        help="specs to run beside `none` (default: prumerge+ at 144 tokens and prumerge at 32)",
    )
    work.add_argument("--image", type=Path, help="picture of every request (default: a drawn one, 640 x 480)")
    work.add_argument(
        "--question",
        default="What is in the picture?",
        help="for reducers that read it; the prompt is --text random tokens (default: %(default)s)",
    )
    work.add_argument("--text", type=int, default=40, help="text tokens of a prompt (default: %(default)s)")
    work.add_argument("--new-tokens", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    work.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    work.add_argument(
        "--prefill", type=int, nargs="+", metavar="LENGTH", help="time prefill alone, at these lengths"
    )
    lengths = list(paper_table.LENGTHS.values())
    work.add_argument(
        "--paper",
        dest="prefill",
        action="store_const",
        const=lengths,
        help=f"--prefill {' '.join(map(str, lengths))}: those of the paper's efficiency table",
    )
    work.add_argument("--tower", action="store_true", help="time the vision tower and the reducers alone")
    how = parser.add_argument_group("measurement")
    how.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    how.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: processor time, for a CPU others use too (default: wall)",
    )
    how.add_argument("--json", action="store_true", help="print JSON instead of a table")
    how.add_argument("--out", type=Path, help="also write the JSON here")
    how.add_argument("--plot", type=Path, help="also draw where the time goes (.png, .svg or .pdf)")


def run(args: argparse.Namespace) -> int:
    for name in ("rounds", "new_tokens", "text", "layers", "batch", "prefill"):
        value = getattr(args, name)
        if value is not None and np.min(value) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
    if (args.model_path is None) == (args.shape is None):
        raise UserError("say what to measure: either --model-path PATH, or --shape 7b --random-weights.")
    if args.layers is not None and args.shape is None:
        raise UserError("--layers goes with --shape: a checkpoint is measured whole.")
    if args.plot is not None:
        charts.check_name(args.plot, "--plot")
    try:
        plan = hardware.plan(args.device, dtype=args.dtype, attention=args.attention)
        reducers = list(dict.fromkeys(map(build_reducer, (DENSE, *args.reducer))))  # the dense run first
    except ValueError as error:
        raise UserError(str(error)) from error
    for warning in plan.warnings:
        print(warning, file=sys.stderr)
    if args.clock == "cpu" and plan.device.type != "cpu":
        raise UserError(f"--clock cpu counts what a CPU does; on {plan.device} use --clock wall.")
    try:
        if args.prefill:
            report, text = _prefill(args, plan)
        elif args.tower:
            report, text = _tower(args, plan, reducers)
        else:
            report, text = _requests(args, plan, reducers)
    except ReducerInputError as error:
        raise UserError(str(error)) from error
    content = json.dumps(report, indent=2, default=asdict)
    print(content if args.json else f"{_headline(report)}\n{text}")
    if args.out:
        write_text(args.out, content + "\n")
    if args.plot and "results" in report:
        plot(report["results"], _headline(report), args.plot)
    return 0


def _requests(args: argparse.Namespace, plan: hardware.Plan, reducers: Sequence[Reducer]) -> tuple[dict, str]:
    """What to write as JSON, and the tables for people."""
    picture, (model, reader), clock = picture_bytes(args.image), _load(args, plan), CLOCKS[args.clock]
    read_question = None if reader is None else partial(reader, args.question)
    results, text = [], ""
    for batch in args.batch:
        prompt = prompt_ids(args.text, model.config.vocab_size)
        work = Workload(picture, prompt, batch, args.new_tokens, read_question)
        runs = [partial(run_once, model, each, work, clock) for each in reducers]
        rounds = interleave(runs, args.rounds, f"batch {batch}")
        rows = [
            summarise(reducer.spec, measured, rounds[0], work, model)
            for reducer, measured in zip(reducers, rounds, strict=True)
        ]
        text += f"\n{_table(rows, args.new_tokens)}\n"
        results += rows
    report = {
        **_circumstances(args, plan),
        "layers": model.config.num_hidden_layers,
        "text_tokens": args.text,
        "new_tokens": args.new_tokens,
        "results": results,
    }
    return report, f"{text}\nms for the whole batch, median (95th percentile)"


def _prefill(args: argparse.Namespace, plan: hardware.Plan) -> tuple[dict, str]:
    """Random embeddings through the language model alone."""
    (model, _), how = _load(args, plan), (args.rounds, CLOCKS[args.clock])
    rows, cells, dense_flops = [], [], prefill_flops(model.config, args.prefill[0])
    for batch in args.batch:
        hidden = torch.randn(
            batch, max(args.prefill), model.config.hidden_size, device=model.device, dtype=model.dtype
        )
        calls = {
            str(length): partial(model, inputs_embeds=hidden[:, :length], use_cache=True, logits_to_keep=1)
            for length in args.prefill
        }
        for row in measure(calls, model.device, batch, *how):
            length = int(row.name)
            flop_ratio = dense_flops / prefill_flops(model.config, length)
            bound = roofline_prefill(model, length, batch)
            rows.append({**asdict(row), "length": length, "flop_ratio": flop_ratio, "roofline_ms": bound})
            ratios = f"{row.speedup:.2f}x", f"{flop_ratio:.2f}x", f"{row.speedup / flop_ratio:.0%}"
            cells.append((str(batch), row.name, _spread(row.time), *ratios, f"{bound:.1f}" if bound else "-"))
    report = {**_circumstances(args, plan), "layers": model.config.num_hidden_layers, "prefill": rows}
    header = ("batch", "length", "prefill ms", "speed-up", "FLOP ratio", "reached", "roofline ms")
    return report, tables.render(header, cells, left=())


def _tower(args: argparse.Namespace, plan: hardware.Plan, reducers: Sequence[Reducer]) -> tuple[dict, str]:
    """All blocks as transformers runs them, what a reducer reads, the patches alone, and the reducers."""
    if args.shape is not None:
        tower = build_tower(SHAPES[args.shape].tower, plan)
    else:
        tower = _load(args, plan)[0].get_vision_tower()
    rows, side = [], tower.image_size
    for batch in args.batch:
        pixels = torch.randn(batch, 3, side, side, device=tower.device, dtype=tower.dtype)
        calls = {
            "all blocks": partial(tower.backbone, pixels),
            "patches, key and CLS query": partial(tower, pixels),
            "patches": partial(tower.tokens, pixels),
            **{each.spec: partial(each, tower(pixels, each.asks)) for each in reducers[1:]},
        }
        rows += measure(calls, tower.device, batch, args.rounds, CLOCKS[args.clock])
    cells = [(row.name, str(row.batch), _spread(row.time), f"{1 / row.speedup:.2%}") for row in rows]
    return {**_circumstances(args, plan), "tower": rows}, tables.render(
        ("call", "batch", "ms", "of all blocks"), cells
    )


def _load(
    args: argparse.Namespace, plan: hardware.Plan
) -> tuple[LlavaMetaForCausalLM, QuestionReader | None]:
    """The model, and what reads questions for its reducers: nothing does for random weights."""
    if args.shape is not None:
        shape = SHAPES[args.shape]
        if args.layers is not None:
            shape = replace(shape, language=replace(shape.language, num_hidden_layers=args.layers))
        return build_model(shape, plan), None
    dtype, device = str(plan.dtype).removeprefix("torch."), str(plan.device)
    source = ModelSource(
        args.model_path, args.model_base, dtype=dtype, attention=plan.attention, device=device
    )
    engine = source.load()
    return engine.model, engine.read_question


def _circumstances(args: argparse.Namespace, plan: hardware.Plan) -> dict:
    """Under what the figures hold."""
    device = plan.device
    return {
        "device": hardware.device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "attention": plan.attention,
        "model": args.shape or Path(args.model_path).name,
        "random_weights": args.shape is not None,
        "clock": args.clock,
        "rounds": args.rounds,
        "warmup": WARMUP,
    }


def _headline(report: dict) -> str:
    threads = f", {report['threads']} thread{'s' * (report['threads'] != 1)}" if report["threads"] else ""
    threads += ", processor time" if report["clock"] == "cpu" else ""
    weights = ", random weights" if report["random_weights"] else ""
    layers = f", {report['layers']} layers" if "layers" in report else ""
    return (
        f"{report['model']}{layers}{weights}, {report['dtype']}, {report['attention']} on "
        f"{report['device']}{threads}; torch {report['torch']}"
    )


def _table(results: Sequence[Result], new_tokens: int) -> str:
    """One batch size: a column per reducer."""
    columns = [
        {
            "visual tokens": str(result.visual_tokens),
            **{stage: _spread(result.stages[stage]) for stage in (*STAGES, "first token")},
            f"request, {new_tokens} tokens": _spread(result.stages["request"]),
            "reducer, of the tower": f"{result.reducer_share:.2%}",
            "prefill speed-up": f"{result.prefill_speedup:.2f}x",
            "  FLOP ratio": f"{result.flop_ratio:.2f}x",
            "first token speed-up": f"{result.first_token_speedup:.2f}x",
            "request speed-up": f"{result.request_speedup:.2f}x",
            "KV cache MB": f"{result.kv_bytes / 1e6:.1f}",
            **({"peak memory MB": f"{result.peak_bytes / 1e6:.1f}"} if result.peak_bytes else {}),
            **({"prefill roofline": f"{bound:.1f}"} if (bound := result.roofline_prefill_ms) else {}),
        }
        for result in results
    ]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return tables.render((f"batch {results[0].batch}", *(result.reducer for result in results)), rows)


def _spread(value: Spread) -> str:
    return f"{value.p50:.1f} ({value.p95:.1f})"


COLOURS = ("#c9ced6", "#aab2bd", "#3b6ea8", "#d9480f", "#7f5aa2", "#2b8a6e", "#e0a526")


def plot(results: Sequence[Result], title: str, out: Path) -> None:
    """Where the time of a request goes: a bar per reducer and batch size, split into stages, per request.

    Raises:
        UserError: `out` cannot be written.
    """
    figure = charts.new_figure(10, 1.6 + 0.42 * len(results), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{result.reducer}, batch {result.batch}" for result in results]
    batch, left = np.array([result.batch for result in results]), np.zeros(len(results))
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        width = np.array([result.stages[stage].p50 for result in results])
        if stage == "decode-token":  # the tokens after the first take what is left of the request
            width = np.array([result.stages["request"].p50 for result in results]) - left * batch
        axes.barh(names, width / batch, left=left, color=colour, label=stage, height=0.62)
        left += width / batch
    for place, (total, result) in enumerate(zip(left, results, strict=True)):
        axes.text(total, place, f"  {total:.0f} ms, {result.request_speedup:.1f}x", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, left.max() * 1.2)
    axes.set_xlabel("ms per request, median")
    axes.set_title(title, fontsize=9, loc="left")
    charts.tidy(axes)
    axes.tick_params(axis="y", labelcolor=charts.INK)
    figure.legend(loc="outside lower center", ncols=len(STAGES), frameon=False, fontsize=8.5)
    charts.save(figure, out)
