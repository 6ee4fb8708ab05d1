"""`llava bench`: where the time of a request goes, with few visual tokens and with all of them.

A request is split into stages, each begun and ended with the device idle. The dense run (reducer `none`,
same dtype, same attention kernel) is always among the runs, and the runs take turns within a round (A B A B),
so that a machine that slows down slows all of them. Figures are medians and 95th percentiles over rounds,
after warm-up rounds that are thrown away.

`--shape 7b --random-weights` needs no checkpoint. `--prefill 616 184 72` times the language model alone at
these lengths; `--paper` does so at the lengths of the PruMerge paper's table, beside its figures. `--tower`
times the vision tower alone, beside the forward of all its blocks.
"""

import argparse
import dataclasses
import io
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llava import hardware
from llava.analysis import charts, paper_table, roofline, tables
from llava.analysis.random_model import build_model, build_tower, language_shape, with_layers
from llava.analysis.shapes import SHAPES, LanguageShape
from llava.analysis.stopwatch import CLOCKS, WALL, Clock, Spread, Stopwatch, peak_memory, reset_peak_memory
from llava.constants import IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.mm_utils import get_model_name_from_path, load_image, process_images
from llava.model.builder import load_pretrained_model
from llava.model.llava_llama import LlavaLlamaForCausalLM
from llava.model.packed import pack
from llava.model.splice import gather, lay_out
from llava.model.vision_tower import VisionTower
from llava.reducers import Reducer, ReducerSpecError, build_reducer

STAGES = ("decode-image", "preprocess", "vision", "reduce", "project", "prefill", "decode-token")
"""`decode-token` is one token after the first; the others happen once per request."""

FIRST = STAGES[:-1]
"""The stages up to the first token."""

DENSE = "none"


@dataclass(frozen=True)
class Workload:
    """A batch of equal requests: one picture and one prompt each.

    Attributes:
        picture: an image file's bytes.
        prompt: [T] int64 ids with one IMAGE_TOKEN_INDEX.
        batch: requests at once.
        new_tokens: length of an answer.
    """

    picture: bytes
    prompt: Tensor
    batch: int
    new_tokens: int


@dataclass(frozen=True)
class Round:
    """One request batch, once.

    Attributes:
        ms: by stage, for the whole batch.
        visual_tokens: per image, as they reach the language model.
        answers: [B, new_tokens] the ids that were decoded.
        length: positions of the padded batch at prefill.
        kv_bytes: keys and values after prefill.
        peak_bytes: memory at the peak (the device's; on a CPU the process's), None if unknown.
    """

    ms: dict[str, float]
    visual_tokens: tuple[int, ...]
    answers: Tensor
    length: int
    kv_bytes: int
    peak_bytes: int | None

    @property
    def first_token_ms(self) -> float:
        return sum(self.ms[stage] for stage in FIRST)

    def request_ms(self, new_tokens: int) -> float:
        return self.first_token_ms + (new_tokens - 1) * self.ms["decode-token"]


@dataclass(frozen=True)
class Result:
    """A reducer at a batch size, over all rounds. Times in ms, for the whole batch.

    Attributes:
        visual_tokens: mean per image.
        padding: part of the prefill batch that is padding.
        *_speedup: of the dense run's time to this one's, the median over rounds.
        flop_ratio: prefill FLOPs of the dense run to this one's: what the speed-up could be.
        roofline_prefill_ms: bound from below on this GPU, None for devices not in the table.
    """

    batch: int
    reducer: str
    visual_tokens: float
    padding: float
    stages: dict[str, Spread]
    first_token: Spread
    request: Spread
    prefill_speedup: float
    first_token_speedup: float
    request_speedup: float
    flop_ratio: float
    kv_bytes: int
    peak_bytes: int | None
    roofline_prefill_ms: float | None


@torch.inference_mode()
def run_once(
    model: LlavaLlamaForCausalLM, image_processor, reducer: Reducer, work: Workload, clock: Clock = WALL
) -> Round:
    """One batch of requests from image bytes to the last token, greedily; stops for no end token."""
    device = model.device
    tower = model.get_vision_tower()
    watch = Stopwatch(device, clock)
    reset_peak_memory(device)
    with watch.stage("decode-image"):
        images = [load_image(work.picture, name="the picture") for _ in range(work.batch)]
    with watch.stage("preprocess"):
        pixels = process_images(images, image_processor, model.config)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4:
            raise UserError("bench measures one view per picture; image_aspect_ratio anyres makes several.")
        pixels = pixels.to(device, tower.dtype)
    if reducer.name == DENSE:
        with watch.stage("vision"):
            visual = list(tower.tokens(pixels))
        watch.ms["reduce"] = 0.0
    else:
        with watch.stage("vision"):
            features = tower(pixels)
        with watch.stage("reduce"):
            visual = reducer(features).unbind()
    with watch.stage("project"):
        embedded = model.project(visual)
    with watch.stage("prefill"):
        layout = lay_out([work.prompt] * work.batch, [len(block) for block in embedded], padding_side="left")
        text = model.get_input_embeddings()(layout.text_ids.to(device))
        embeds = gather(layout, text, [block.to(text) for block in embedded])
        mask = layout.attention_mask.to(device) if layout.padded else None
        positions = layout.position_ids.to(device) if layout.padded else None
        output = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
        )
        token = output.logits[:, -1:].argmax(-1)
    answers = [token]
    cache = output.past_key_values
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    steps = work.new_tokens - 1
    lengths = torch.tensor(layout.lengths, device=device)[:, None]
    with watch.stage("decode-token"):
        for step in range(steps):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(work.batch, 1)], dim=1)
            output = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=lengths + step,
                past_key_values=cache,
                use_cache=True,
            )
            token = output.logits[:, -1:].argmax(-1)
            answers.append(token)
    watch.ms["decode-token"] /= max(steps, 1)
    return Round(
        ms=watch.ms,
        visual_tokens=tuple(len(block) for block in visual),
        answers=torch.cat(answers, dim=1),
        length=embeds.shape[1],
        kv_bytes=kv_bytes,
        peak_bytes=peak_memory(device),
    )


def interleave(
    runs: Sequence[Callable[[], object]], rounds: int, warmup: int, advance: Callable[[], None]
) -> list[list]:
    """Every run once per round, in turn; the results of the rounds after warm-up, by run."""
    kept: list[list] = [[] for _ in runs]
    for number in range(warmup + rounds):
        for run, results in zip(runs, kept, strict=True):
            result = run()
            if number >= warmup:
                results.append(result)
            advance()
    return kept


def summarise(
    reducer: str,
    rounds: Sequence[Round],
    dense: Sequence[Round],
    work: Workload,
    model: LlavaLlamaForCausalLM,
) -> Result:
    """What the rounds of one reducer say beside the dense rounds taken in turn with them."""

    def speedup(time: Callable[[Round], float]) -> float:
        return float(np.median([time(other) / time(one) for one, other in zip(rounds, dense, strict=True)]))

    one, full = rounds[0], dense[0]
    text = len(work.prompt) - 1
    shape = language_shape(model.config)
    real = sum(one.visual_tokens) + work.batch * text
    return Result(
        batch=work.batch,
        reducer=reducer,
        visual_tokens=float(np.mean(one.visual_tokens)),
        padding=1 - real / (work.batch * one.length),
        stages={stage: Spread.over([each.ms[stage] for each in rounds]) for stage in STAGES},
        first_token=Spread.over([each.first_token_ms for each in rounds]),
        request=Spread.over([each.request_ms(work.new_tokens) for each in rounds]),
        prefill_speedup=speedup(lambda each: each.ms["prefill"]),
        first_token_speedup=speedup(lambda each: each.first_token_ms),
        request_speedup=speedup(lambda each: each.request_ms(work.new_tokens)),
        flop_ratio=prefill_flops(shape, full.length) / prefill_flops(shape, one.length),
        kv_bytes=one.kv_bytes,
        peak_bytes=max((each.peak_bytes for each in rounds if each.peak_bytes is not None), default=None),
        roofline_prefill_ms=roofline_prefill(model, one.length, work.batch),
    )


def prefill_flops(shape: LanguageShape, length: int) -> float:
    """FLOPs of the prefill of one sequence of `length` positions."""
    return sum(op.flops for op in roofline.prefill_operators(shape, length, 1, roofline.PRECISIONS["fp16"]))


def roofline_prefill(model: LlavaLlamaForCausalLM, length: int, batch: int) -> float | None:
    """The bound on prefill time on the model's GPU, ms; None where the card is not in the table."""
    if model.device.type != "cuda":
        return None
    try:
        gpu = hardware.find_gpu(torch.cuda.get_device_name(model.device))
    except ValueError:
        return None
    precision = roofline.PRECISIONS["fp32" if model.dtype is torch.float32 else "fp16"]
    operators = roofline.prefill_operators(language_shape(model.config), length, batch, precision)
    return roofline.estimate(operators, gpu).ms


# Prefill alone ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefill:
    """Prefill of one length. ms for the whole batch; ratios are against the first length measured."""

    length: int
    time: Spread
    speedup: float
    flop_ratio: float
    peak_bytes: int | None
    roofline_ms: float | None


@torch.inference_mode()
def prefill_once(
    model: LlavaLlamaForCausalLM, length: int, batch: int, clock: Clock = WALL
) -> tuple[float, int | None]:
    """Time (ms) and peak memory of one prefill of random embeddings."""
    embeds = torch.randn(batch, length, model.config.hidden_size, device=model.device, dtype=model.dtype)
    watch = Stopwatch(model.device, clock)
    reset_peak_memory(model.device)
    with watch.stage("prefill"):
        model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1)
    return watch.ms["prefill"], peak_memory(model.device)


def measure_prefill(
    model: LlavaLlamaForCausalLM,
    lengths: Sequence[int],
    *,
    batch: int,
    rounds: int,
    warmup: int,
    clock: Clock,
) -> list[Prefill]:
    """Each length in turn, `rounds` times."""
    with tqdm(total=(rounds + warmup) * len(lengths), desc="prefill", file=sys.stderr) as bar:
        runs = [lambda length=length: prefill_once(model, length, batch, clock) for length in lengths]
        measured = interleave(runs, rounds, warmup, bar.update)
    shape = language_shape(model.config)
    first = measured[0]
    return [
        Prefill(
            length=length,
            time=Spread.over([ms for ms, _ in results]),
            speedup=float(
                np.median([other / ms for (ms, _), (other, _) in zip(results, first, strict=True)])
            ),
            flop_ratio=prefill_flops(shape, lengths[0]) / prefill_flops(shape, length),
            peak_bytes=max((peak for _, peak in results if peak is not None), default=None),
            roofline_ms=roofline_prefill(model, length, batch),
        )
        for length, results in zip(lengths, measured, strict=True)
    ]


# The tower alone -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TowerTime:
    """One way through the tower. ms for the whole batch; `part` is of the time of all its blocks."""

    way: str
    time: Spread
    part: float


@torch.inference_mode()
def measure_tower(
    tower: VisionTower, *, batch: int, rounds: int, warmup: int, clock: Clock
) -> list[TowerTime]:
    """All blocks as transformers runs them, what a reducer reads, and the patches alone, in turn."""
    side = tower.image_size
    pixels = torch.randn(batch, 3, side, side, device=tower.device, dtype=tower.dtype)
    ways = {
        "all blocks": tower.backbone,
        "patches, key and CLS query": tower,
        "patches": tower.tokens,
    }

    def once(way: Callable[[Tensor], object]) -> float:
        watch = Stopwatch(tower.device, clock)
        with watch.stage("tower"):
            way(pixels)
        return watch.ms["tower"]

    with tqdm(total=(rounds + warmup) * len(ways), desc="tower", file=sys.stderr) as bar:
        runs = [lambda way=way: once(way) for way in ways.values()]
        measured = interleave(runs, rounds, warmup, bar.update)
    whole = measured[0]
    return [
        TowerTime(
            way=name,
            time=Spread.over(times),
            part=float(np.median([one / other for one, other in zip(times, whole, strict=True)])),
        )
        for name, times in zip(ways, measured, strict=True)
    ]


# The command -----------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("model")
    what.add_argument("--model-path", help="a checkpoint")
    what.add_argument("--model-base", help="the base of a LoRA or projector-only checkpoint")
    what.add_argument("--shape", choices=SHAPES, help="instead: a model of this shape with random weights")
    what.add_argument("--random-weights", action="store_true", help="said with --shape, which implies it")
    what.add_argument("--layers", type=int, help="with --shape: only so many decoder layers")
    what.add_argument("--device", help="default: the best there is")
    what.add_argument("--dtype", help="float16, bfloat16 or float32 (default: the device's best)")
    what.add_argument(
        "--packed", action="store_true", help="on a CPU: weights packed for oneDNN (twice the memory)"
    )
    what.add_argument("--attention", help="sdpa, eager, flash_attention_2 (default: the device's best)")
    work = parser.add_argument_group("requests")
    work.add_argument(
        "--reducer",
        nargs="+",
        default=["prumerge+(tokens=144)", "prumerge(tokens=32)"],
        help="specs to run beside `none` (default: prumerge+ at 144 tokens and prumerge at 32)",
    )
    work.add_argument("--image", type=Path, help="picture of every request (default: a drawn one, 640 x 480)")
    work.add_argument("--text", type=int, default=40, help="text tokens of a prompt (default: %(default)s)")
    work.add_argument("--new-tokens", type=int, default=16, help="tokens of an answer (default: %(default)s)")
    work.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes (default: 1)")
    work.add_argument(
        "--prefill", type=int, nargs="+", metavar="LENGTH", help="time prefill alone, at these lengths"
    )
    work.add_argument(
        "--paper", action="store_true", help="time the prefills of the paper's efficiency table"
    )
    work.add_argument("--tower", action="store_true", help="time the vision tower alone")
    how = parser.add_argument_group("measurement")
    how.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    how.add_argument("--warmup", type=int, default=2, help="rounds thrown away (default: %(default)s)")
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
    for name in ("rounds", "new_tokens"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")
    if min(args.batch) < 1 or args.text < 1 or args.warmup < 0:
        raise UserError("--batch and --text must be at least 1, --warmup at least 0.")
    if args.model_path is None and args.shape is None:
        raise UserError("say what to measure: --model-path PATH, or --shape 7b --random-weights.")
    if args.model_path is not None and args.shape is not None:
        raise UserError("--model-path and --shape exclude each other.")
    if args.layers is not None and args.shape is None:
        raise UserError("--layers goes with --shape: a checkpoint is measured whole.")
    if args.plot is not None:
        charts.check_name(args.plot, "--plot")
    if args.paper or args.prefill:
        return _run_prefill(args)
    if args.tower:
        return _run_tower(args)
    return _run_requests(args)


def _run_requests(args: argparse.Namespace) -> int:
    reducers = _reducers(args)
    picture = _picture(args.image)
    model, processor, plan = _load(args, with_tower=True)
    _tower_of(model, args)
    clock = _clock(args.clock, plan)
    results = []
    total = len(args.batch) * len(reducers) * (args.rounds + args.warmup)
    with tqdm(total=total, desc="bench", file=sys.stderr) as bar:
        for batch in args.batch:
            work = Workload(picture, _prompt(args.text, model.config.vocab_size), batch, args.new_tokens)
            runs = [
                lambda each=each, work=work: run_once(model, processor, each, work, clock)
                for each in reducers
            ]
            rounds = interleave(runs, args.rounds, args.warmup, bar.update)
            for reducer, measured in zip(reducers, rounds, strict=True):
                results.append(summarise(reducer.spec, measured, rounds[0], work, model))
    report = {
        **_circumstances(args, plan),
        "layers": model.config.num_hidden_layers,
        "text_tokens": args.text,
        "new_tokens": args.new_tokens,
        "results": [dataclasses.asdict(result) for result in results],
    }
    _write(report, args)
    if not args.json:
        print(_headline(report))
        for batch in args.batch:
            print()
            print(_table([result for result in results if result.batch == batch], args.new_tokens))
        print("\nms for the whole batch, median (95th percentile)")
    if args.plot:
        plot(results, _headline(report), args.plot)
    return 0


def _run_prefill(args: argparse.Namespace) -> int:
    lengths = args.prefill or list(paper_table.LENGTHS.values())
    if min(lengths) < 1:
        raise UserError("--prefill takes lengths of at least 1.")
    model, _, plan = _load(args, with_tower=False)
    clock = _clock(args.clock, plan)
    measured = {
        batch: measure_prefill(
            model, lengths, batch=batch, rounds=args.rounds, warmup=args.warmup, clock=clock
        )
        for batch in args.batch
    }
    report = {
        **_circumstances(args, plan),
        "layers": model.config.num_hidden_layers,
        "prefill": [
            {"batch": batch, **dataclasses.asdict(row)} for batch, rows in measured.items() for row in rows
        ],
    }
    _write(report, args)
    if args.json:
        return 0
    print(_headline(report))
    header = ["batch", "length", "prefill ms", "speed-up", "FLOP ratio", "reached", "peak MB"]
    cells = [
        [
            str(batch),
            str(row.length),
            f"{row.time.p50:.1f} ({row.time.p95:.1f})",
            f"{row.speedup:.2f}x",
            f"{row.flop_ratio:.2f}x",
            f"{row.speedup / row.flop_ratio:.0%}",
            _megabytes(row.peak_bytes),
        ]
        for batch, rows in measured.items()
        for row in rows
    ]
    if any(row.roofline_ms for rows in measured.values() for row in rows):
        header.append("roofline ms")
        for cell, row in zip(cells, (row for rows in measured.values() for row in rows), strict=True):
            cell.append("-" if row.roofline_ms is None else f"{row.roofline_ms:.1f}")
    print(tables.render(header, cells, left=()))
    if args.paper and args.shape in ("7b", "13b"):
        printed = [paper_table.PRINTED[f"{args.shape}-fp16-{name}"][1] for name in paper_table.LENGTHS]
        lengths_said = " and ".join(map(str, paper_table.LENGTHS.values()))
        print(
            f"The paper prints {' and '.join(printed)} ms for {args.shape}, FP16, at lengths {lengths_said}: "
            "a roofline of a V100, not a measurement."
        )
    return 0


def _run_tower(args: argparse.Namespace) -> int:
    if args.shape is not None:
        plan = _plan(args)
        tower = build_tower(SHAPES[args.shape].tower, plan)
        _pack_if_asked(tower, args, plan)
    else:
        model, _, plan = _load(args, with_tower=True)
        tower = _tower_of(model, args)
    clock = _clock(args.clock, plan)
    measured = {
        batch: measure_tower(tower, batch=batch, rounds=args.rounds, warmup=args.warmup, clock=clock)
        for batch in args.batch
    }
    rows = [(batch, row) for batch, found in measured.items() for row in found]
    report = {
        **_circumstances(args, plan),
        "tower": [{"batch": batch, **dataclasses.asdict(row)} for batch, row in rows],
    }
    _write(report, args)
    if not args.json:
        print(_headline(report))
        cells = [
            (row.way, str(batch), f"{row.time.p50:.1f} ({row.time.p95:.1f})", f"{row.part:.3f}")
            for batch, row in rows
        ]
        print(tables.render(("way", "batch", "ms", "of all blocks"), cells))
    return 0


def _tower_of(model: LlavaLlamaForCausalLM, args: argparse.Namespace) -> VisionTower:
    tower = model.get_vision_tower()
    if tower is None:
        raise UserError(f"{args.model_path} has no vision tower, so there are no pictures to measure.")
    return tower


def _reducers(args: argparse.Namespace) -> list[Reducer]:
    """The dense run first, then what was asked for."""
    try:
        reducers = [build_reducer(DENSE), *(build_reducer(spec) for spec in args.reducer)]
    except ReducerSpecError as error:
        raise UserError(str(error)) from error
    return list(dict.fromkeys(reducers))


def _load(args: argparse.Namespace, *, with_tower: bool):
    """(model, image processor, plan)."""
    plan = _plan(args)
    if args.shape is not None:
        model = build_model(with_layers(SHAPES[args.shape], args.layers), plan, with_tower=with_tower)
        _pack_if_asked(model, args, plan)
        tower = model.get_vision_tower()
        return model, None if tower is None else tower.image_processor, plan
    _, model, processor, _ = load_pretrained_model(
        args.model_path,
        args.model_base,
        get_model_name_from_path(args.model_path),
        device_map={"": plan.device},
        dtype=plan.dtype,
        attn_implementation=plan.attention,
    )
    _pack_if_asked(model, args, plan)
    return model, processor, plan


def _pack_if_asked(model: torch.nn.Module, args: argparse.Namespace, plan: hardware.Plan) -> None:
    if args.packed and (plan.device.type, plan.dtype) != ("cpu", torch.float32):
        raise UserError(f"--packed is for float32 on a CPU, not {plan.dtype} on {plan.device}.")
    if args.packed:
        pack(model)


def _plan(args: argparse.Namespace) -> hardware.Plan:
    try:
        plan = hardware.plan(args.device, dtype=args.dtype, attention=args.attention)
    except ValueError as error:
        raise UserError(str(error)) from error
    for warning in plan.warnings:
        print(warning, file=sys.stderr)
    return plan


def _clock(name: str, plan: hardware.Plan) -> Clock:
    if name == "cpu" and plan.device.type != "cpu":
        raise UserError(f"--clock cpu counts what a CPU does; on {plan.device} use --clock wall.")
    return CLOCKS[name]


def _prompt(text: int, vocabulary: int) -> Tensor:
    """`text` arbitrary ids with the picture's placeholder in their middle: what they say costs no time."""
    ids = torch.randint(3, vocabulary, (text,), generator=torch.Generator().manual_seed(0))
    return torch.cat([ids[: text // 2], torch.tensor([IMAGE_TOKEN_INDEX]), ids[text // 2 :]])


def _picture(path: Path | None) -> bytes:
    """An image file, or a drawn JPEG of 640 x 480 with as much detail as a photograph has."""
    if path is not None:
        load_image(path)  # its errors are for people
        return path.read_bytes()
    noise = np.random.default_rng(0)
    layers = [
        Image.fromarray(noise.integers(0, 256, (3 * size, 4 * size, 3), dtype=np.uint8)).resize(
            (640, 480), Image.Resampling.BICUBIC
        )
        for size in (2, 8, 40)
    ]
    mixed = Image.blend(Image.blend(layers[0], layers[1], 0.35), layers[2], 0.2)
    file = io.BytesIO()
    mixed.save(file, "JPEG", quality=90)
    return file.getvalue()


def _circumstances(args: argparse.Namespace, plan: hardware.Plan) -> dict:
    """Under what the figures hold."""
    device = plan.device
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": name,
        "device_type": device.type,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "attention": plan.attention,
        "packed": args.packed,
        "model": args.shape or Path(args.model_path).name,
        "random_weights": args.shape is not None,
        "clock": args.clock,
        "rounds": args.rounds,
        "warmup": args.warmup,
    }


def _headline(report: dict) -> str:
    threads = f", {report['threads']} thread{'s' * (report['threads'] != 1)}" if report["threads"] else ""
    threads += ", packed weights" if report["packed"] else ""
    threads += ", processor time" if report["clock"] == "cpu" else ""
    weights = ", random weights" if report["random_weights"] else ""
    layers = f", {report['layers']} layers" if "layers" in report else ""
    return (
        f"{report['model']}{layers}{weights}, {report['dtype']}, {report['attention']} on "
        f"{report['device']}{threads}; torch {report['torch']}"
    )


def _write(report: dict, args: argparse.Namespace) -> None:
    text = json.dumps(report, indent=2)
    if args.json:
        print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        beside = args.out.with_name(f".{args.out.name}.part")
        beside.write_text(text + "\n")
        beside.replace(args.out)


def _table(results: Sequence[Result], new_tokens: int) -> str:
    """One batch size: a column per reducer."""

    def spread(value: Spread) -> str:
        return f"{value.p50:.1f} ({value.p95:.1f})"

    rows = [
        ("visual tokens", *(f"{result.visual_tokens:.0f}" for result in results)),
        ("padding", *(f"{result.padding:.1%}" for result in results)),
        *((stage, *(spread(result.stages[stage]) for result in results)) for stage in STAGES),
        ("first token", *(spread(result.first_token) for result in results)),
        (f"request, {new_tokens} tokens", *(spread(result.request) for result in results)),
        ("prefill speed-up", *(f"{result.prefill_speedup:.2f}x" for result in results)),
        ("  FLOP ratio", *(f"{result.flop_ratio:.2f}x" for result in results)),
        ("first token speed-up", *(f"{result.first_token_speedup:.2f}x" for result in results)),
        ("request speed-up", *(f"{result.request_speedup:.2f}x" for result in results)),
        ("KV cache MB", *(_megabytes(result.kv_bytes) for result in results)),
        ("peak memory MB", *(_megabytes(result.peak_bytes) for result in results)),
    ]
    if any(result.roofline_prefill_ms is not None for result in results):
        rows.append(("prefill roofline", *(f"{result.roofline_prefill_ms or 0:.1f}" for result in results)))
    return tables.render((f"batch {results[0].batch}", *(result.reducer for result in results)), rows)


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.1f}"


COLOURS = ("#c9ced6", "#aab2bd", "#3b6ea8", "#d9480f", "#7f5aa2", "#2b8a6e", "#e0a526")


def plot(results: Sequence[Result], title: str, out: Path) -> None:
    """Where the time of a request goes: a bar per reducer and batch size, split into stages, per request.

    Raises:
        UserError: `out` cannot be written.
    """
    figure = charts.new_figure(10, 1.6 + 0.42 * len(results), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{result.reducer}, batch {result.batch}" for result in results]
    left = np.zeros(len(results))
    for stage, colour in zip(STAGES, COLOURS, strict=True):
        width = np.array([_stage_share(result, stage) for result in results])
        axes.barh(names, width, left=left, color=colour, label=stage, height=0.62)
        left += width
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


def _stage_share(result: Result, stage: str) -> float:
    """ms of one request; the tokens after the first take what is left of it."""
    if stage == "decode-token":
        return (result.request.p50 - sum(result.stages[each].p50 for each in FIRST)) / result.batch
    return result.stages[stage].p50 / result.batch
