"""`llava roofline`: what fewer visual tokens can save on a GPU, by arithmetic alone.

Each operation takes max(FLOPs / peak, bytes / bandwidth). No torch, no GPU, no weights: a bound from below,
against which `llava bench` measures. `--paper` recomputes the efficiency table of the PruMerge paper with its
own accounting (`llava.analysis.paper_table`).

What the accounting here does otherwise: the tower, the reducer and the projector are counted; attention is
fused (scores never reach memory; keys and values are re-read once per block of 128 queries); SwiGLU has its
real width; an addition reads both operands; lm_head costs 2 FLOPs per weight and is read in its real width;
4-bit weights are multiplied in 16 bits, as every kernel in use does.
"""

import argparse
import dataclasses
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava import hardware
from llava.analysis import charts, paper_table, tables
from llava.analysis.shapes import SHAPES, LanguageShape, Shape, TowerShape
from llava.errors import UserError

QUERY_BLOCK = 128
"""Queries a fused attention kernel handles while it reads all keys and values once."""

NEIGHBOURS = 32
"""Patches PruMerge merges into each kept one."""


@dataclass(frozen=True)
class Precision:
    """Bytes per weight and per activation (and cached key or value), and which rate multiplies them.

    Attributes:
        rate: of products with (maybe quantised) weights, a field of `hardware.Gpu`.
        plain_rate: of everything else.
    """

    name: str
    weight_bytes: float
    activation_bytes: float
    rate: str = "half"
    plain_rate: str = "half"

    @property
    def plain(self) -> "Precision":
        """Of the parts that are never quantised: tower, projector, embeddings."""
        return Precision(
            self.name, self.activation_bytes, self.activation_bytes, self.plain_rate, self.plain_rate
        )


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp16", 2, 2),
        Precision("bf16", 2, 2),
        Precision("fp32", 4, 4, "single", "single"),
        Precision("w8a16", 1, 2),
        Precision("w4a16", 0.5, 2),
        Precision("w8a8", 1, 2, "int8"),  # activations rest in 16 bits and are quantised in the kernel
    )
}


@dataclass(frozen=True)
class Operator:
    """One operation: FLOPs, bytes read and written, and the rate (a field of `hardware.Gpu`) it runs at."""

    flops: float
    bytes: float
    rate: str


@dataclass(frozen=True)
class Estimate:
    """A stage on one GPU.

    Attributes:
        tflops: operations, 1e12.
        gigabytes: bytes moved, 1e9.
        ms: the bound from below on its time.
        bytes_share: the part of that time in which memory, not arithmetic, is the bottleneck.
    """

    tflops: float
    gigabytes: float
    ms: float
    bytes_share: float

    @property
    def bound(self) -> str:
        return "bytes" if self.bytes_share > 0.5 else "arithmetic"


@dataclass(frozen=True)
class Request:
    """The stages of a batch of requests, from pixels on the device to the first token, and one token more.

    Attributes:
        visual: visual tokens per image that reach the language model.
        kv_gb: cached keys and values after prefill, the whole batch, 1e9 bytes.
        weights_gb: tower, projector and language model.
    """

    visual: int
    vision: Estimate
    reduce: Estimate
    project: Estimate
    prefill: Estimate
    decode: Estimate
    kv_gb: float
    weights_gb: float

    @property
    def first_token_ms(self) -> float:
        """Vision, reduction, projection and prefill of the whole batch."""
        return self.vision.ms + self.reduce.ms + self.project.ms + self.prefill.ms


def estimate(operators: Iterable[Operator], gpu: hardware.Gpu) -> Estimate:
    """Sum of max(FLOPs / rate, bytes / bandwidth)."""
    rates = {"half": gpu.half, "single": gpu.single, "int8": gpu.int8}
    flops = moved = seconds = waiting = 0.0
    for operator in operators:
        arithmetic, memory = operator.flops / rates[operator.rate], operator.bytes / gpu.bandwidth
        flops += operator.flops
        moved += operator.bytes
        seconds += max(arithmetic, memory)
        waiting += memory if memory > arithmetic else 0.0
    return Estimate(flops / 1e12, moved / 1e9, seconds * 1e3, waiting / seconds if seconds else 0.0)


def product(rows: float, inputs: int, outputs: int, precision: Precision) -> Operator:
    """[rows, inputs] x [inputs, outputs]."""
    activations = rows * (inputs + outputs) * precision.activation_bytes
    weights = inputs * outputs * precision.weight_bytes
    return Operator(2 * rows * inputs * outputs, weights + activations, precision.rate)


def prefill_operators(
    language: LanguageShape, tokens: int, batch: int, precision: Precision
) -> list[Operator]:
    """All layers over `tokens` positions of `batch` sequences, and lm_head of the last position of each."""
    rows = batch * tokens
    row_bytes = rows * precision.activation_bytes
    blocks = math.ceil(tokens / QUERY_BLOCK)
    attention = Operator(
        batch * tokens**2 * (4 * language.hidden + 5 * language.heads),
        row_bytes * (2 * language.hidden + blocks * 2 * language.kv_width),
        precision.plain_rate,
    )
    layer = [
        *(product(rows, inputs, outputs, precision) for _, inputs, outputs in language.linears),
        attention,
        *_elementwise(language, rows, precision),
    ]
    return [*layer * language.layers, _head(language, batch, precision)]


def decode_operators(
    language: LanguageShape, context: int, batch: int, precision: Precision
) -> list[Operator]:
    """One more token for each of `batch` sequences whose cache holds `context` tokens."""
    attention = Operator(
        batch * context * (4 * language.hidden + 5 * language.heads),
        batch * (2 * context * language.kv_width + 2 * language.hidden) * precision.activation_bytes,
        precision.plain_rate,
    )
    layer = [
        *(product(batch, inputs, outputs, precision) for _, inputs, outputs in language.linears),
        attention,
        *_elementwise(language, batch, precision),
    ]
    return [*layer * language.layers, _head(language, batch, precision)]


def vision_operators(tower: TowerShape, images: int, blocks: int, precision: Precision) -> list[Operator]:
    """The first `blocks` blocks of a tower; its position-wise steps are taken as fused into the products."""
    plain = precision.plain
    tokens = tower.patches + 1
    rows = images * tokens
    block = [
        *[product(rows, tower.hidden, tower.hidden, plain)] * 4,
        product(rows, tower.hidden, tower.intermediate, plain),
        product(rows, tower.intermediate, tower.hidden, plain),
        Operator(
            4 * images * tokens**2 * tower.hidden,
            4 * rows * tower.hidden * plain.activation_bytes,
            plain.rate,
        ),
    ]
    return [product(images * tower.patches, 3 * tower.patch**2, tower.hidden, plain), *block * blocks]


def reduce_operators(tower: TowerShape, images: int, kept: int, precision: Precision) -> list[Operator]:
    """PruMerge: keys and the CLS query, CLS attention, kept x all similarities, weighted sums of neighbours.

    Nothing at all where every patch is kept.
    """
    if kept >= tower.patches:
        return []
    plain = precision.plain
    patches, hidden, width = tower.patches, tower.hidden, plain.activation_bytes
    keys = images * patches * hidden * width
    gathered = images * kept * (NEIGHBOURS + 2) * hidden * width
    return [
        product(images * (patches + 1), hidden, hidden, plain),
        product(images, hidden, hidden, plain),
        Operator(2 * images * patches * hidden, keys, plain.rate),
        Operator(
            2 * images * kept * patches * hidden,
            keys + images * kept * (hidden * width + patches * 4),  # similarities are float32
            plain.rate,
        ),
        Operator(2 * images * kept * NEIGHBOURS * hidden, gathered, plain.rate),
    ]


def project_operators(shape: Shape, images: int, visual: int, precision: Precision) -> list[Operator]:
    """mlp2x_gelu."""
    hidden, plain = shape.language.hidden, precision.plain
    return [
        product(images * visual, shape.tower.hidden, hidden, plain),
        product(images * visual, hidden, hidden, plain),
    ]


def request(
    shape: Shape,
    gpu: hardware.Gpu,
    precision: Precision,
    *,
    text: int,
    visual: int,
    batch: int,
    images: int = 1,
) -> Request:
    """A batch of requests of `text` text tokens and `images` images each, `visual` tokens kept per image."""
    language, tower = shape.language, shape.tower
    tokens = text + images * visual
    pictures = batch * images
    # The features are the output of the last block but one: the last block is never run.
    vision = vision_operators(tower, pictures, tower.layers - 1, precision)
    return Request(
        visual=visual,
        vision=estimate(vision, gpu),
        reduce=estimate(reduce_operators(tower, pictures, visual, precision), gpu),
        project=estimate(project_operators(shape, pictures, visual, precision), gpu),
        prefill=estimate(prefill_operators(language, tokens, batch, precision), gpu),
        decode=estimate(decode_operators(language, tokens, batch, precision), gpu),
        kv_gb=kv_bytes(language, tokens, batch, precision.activation_bytes) / 1e9,
        weights_gb=weight_bytes(shape, precision) / 1e9,
    )


def weight_bytes(shape: Shape, precision: Precision) -> float:
    """Tower, projector, embeddings, layers and head in device memory."""
    language, tower = shape.language, shape.tower
    embeddings = language.vocabulary * language.hidden
    head = 0 if language.tied_head else embeddings
    tower_weights = tower.layers * (4 * tower.hidden**2 + 2 * tower.hidden * tower.intermediate)
    projector = tower.hidden * language.hidden + language.hidden**2
    quantised = (language.layers * language.layer_weights + head) * precision.weight_bytes
    return quantised + (embeddings + tower_weights + projector) * precision.activation_bytes


def kv_bytes(language: LanguageShape, tokens: int, batch: int, width: float) -> float:
    """Cached keys and values of `batch` sequences of `tokens` tokens, `width` bytes a number."""
    return batch * tokens * 2 * language.layers * language.kv_width * width


def break_even(gpu: hardware.Gpu, precision: Precision) -> float:
    """Tokens in flight (text + visual, times batch) below which weights take longer to read than to use.

    n tokens cost 2 n FLOPs per weight, a weight is read once: n = peak x bytes per weight / (2 bandwidth).
    """
    rate = {"half": gpu.half, "single": gpu.single, "int8": gpu.int8}[precision.rate]
    return rate * precision.weight_bytes / (2 * gpu.bandwidth)


@dataclass(frozen=True)
class Capacity:
    """How long a benchmark takes on several GPUs.

    Attributes:
        seconds_per_batch: one batch on one GPU, the efficiency counted in.
        minutes: all questions on all GPUs.
    """

    visual: int
    seconds_per_batch: float
    minutes: float


def capacity(
    one: Request,
    *,
    batch: int,
    questions: int,
    gpus: int,
    answer: int,
    images_per_question: float,
    efficiency: float,
) -> Capacity:
    """Questions are spread evenly; each is one prefill and `answer` decoded tokens.

    Args:
        images_per_question: 1 encodes the picture for every question, less reuses it.
        efficiency: the part of the roofline's speed that is reached.
    """
    encode = (one.vision.ms + one.reduce.ms) * images_per_question
    ms = (encode + one.project.ms + one.prefill.ms + max(answer - 1, 0) * one.decode.ms) / efficiency
    return Capacity(one.visual, ms / 1e3, math.ceil(questions / (batch * gpus)) * ms / 60e3)


def _elementwise(language: LanguageShape, rows: int, precision: Precision) -> list[Operator]:
    """Two norms (7 operations), two additions (two operands), SwiGLU's gate at its real width."""
    hidden = rows * language.hidden
    inner = rows * language.intermediate

    def operator(flops: float, numbers: float) -> Operator:
        return Operator(flops, numbers * precision.activation_bytes, precision.plain_rate)

    norm, add = operator(7 * hidden, 2 * hidden), operator(hidden, 3 * hidden)
    return [norm, norm, add, add, operator(2 * inner, 3 * inner)]


def _head(language: LanguageShape, rows: int, precision: Precision) -> Operator:
    """lm_head, quantised like the layers (bitsandbytes leaves it in 16 bits: 0.2 ms more on a V100)."""
    return product(rows, language.hidden, language.vocabulary, precision)


# The command -----------------------------------------------------------------------------------------

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
        from llava.analysis import scaling  # imports this module

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
