"""How many questions a second the evaluation answers, ingredient by ingredient, on a set of POPE's shape.

    llava mini benchmarks                      # once: playground/data/eval-mini, 18 questions a picture
    python scripts/bench_eval.py [--rounds 5] [--images 8] [--clock cpu] [--json docs/measurements/eval.json]
    python scripts/bench_eval.py --padding     # how much of what is computed is padding; needs no model

The ways, each with what the one before it has:

    one at a time    a loop over questions: read the picture, encode it, ask, with every visual token
    fewer tokens     the reducer behind the tower
    batching         questions of similar length together, each with its own copy of the picture
    image reuse      a picture is read and encoded once for all its questions
    prefix reuse     so is what the language model makes of it: the loop of `llava eval`
    packed weights   the same with `llava eval --packed` (on a CPU)

One process, one thread unless OMP_NUM_THREADS says otherwise. The ways take turns within each round, so that
a machine that slows down slows all of them alike; a factor is the median over rounds of the ratio within a
round. The slow ways answer fewer questions a round. All answer alike (checked). `--clock cpu` counts
processor time, which a busy machine disturbs less.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from llava import hardware
from llava.analysis.stopwatch import CLOCKS, Clock, synchronise
from llava.analysis.tables import render
from llava.conversation import default_conv_mode
from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.predict import (
    Answerer,
    Generation,
    Ready,
    Request,
    answer_all,
    batches,
    decode,
    predict,
    questions_of,
)
from llava.eval.run import requests_of
from llava.eval.store import Store, unit_size, units_of
from llava.mm_utils import get_model_name_from_path
from llava.model.builder import load_pretrained_model
from llava.model.packed import can_pack
from llava.model.prefix import Prefix

DENSE = "none"


# --- the ways ---


def whole_prompts(
    answerer: Answerer, requests: Sequence[Request], visual: Sequence[Tensor]
) -> dict[Any, str]:
    """Answers of requests with the visual tokens of their pictures, in batches of whole prompts."""
    ids = [answerer.ids(request.text, with_image=True) for request in requests]
    lengths = [len(one) - 1 + len(tokens) for one, tokens in zip(ids, visual, strict=True)]
    order = sorted(range(len(ids)), key=lambda place: -lengths[place])
    new = answerer.generation.max_new_tokens
    answers = {}
    for part in batches(
        [lengths[place] for place in order], lambda most: answerer.batch_tokens // (most + new)
    ):
        places = order[part]
        texts = answerer.answer([ids[place] for place in places], [visual[place] for place in places])
        answers |= {requests[place].id: text for place, text in zip(places, texts, strict=True)}
    return answers


def encoded(answerer: Answerer, requests: Sequence[Request]) -> list[Tensor]:
    """The visual tokens of each request's picture, read and encoded for each."""
    return answerer.encode([decode(one.image, answerer.image_processor, answerer.recipe) for one in requests])


def one_at_a_time(answerer: Answerer, requests: Sequence[Request]) -> dict[Any, str]:
    answers = {}
    for request in requests:
        answers |= whole_prompts(answerer, [request], encoded(answerer, [request]))
    return answers


def batching(answerer: Answerer, requests: Sequence[Request]) -> dict[Any, str]:
    return whole_prompts(answerer, requests, encoded(answerer, requests))


def image_reuse(answerer: Answerer, requests: Sequence[Request]) -> dict[Any, str]:
    first = list({request.image: request for request in requests}.values())
    tokens = dict(zip((one.image for one in first), encoded(answerer, first), strict=True))
    return whole_prompts(answerer, requests, [tokens[request.image] for request in requests])


def prefix_reuse(answerer: Answerer, requests: Sequence[Request]) -> dict[Any, str]:
    """`llava eval`'s own loop, answers file and all."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "answers.jsonl", questions_of(requests), {})
        predict(requests, answerer, store, "bench", decode_workers=0, show_progress=False)
        store.close()
        rows = map(json.loads, store.files.answers.read_text().splitlines())
        return {row["question_id"]: row["text"] for row in rows}


Way = Callable[[Answerer, Sequence[Request]], dict[Any, str]]
SLOW, ONE_PICTURE, ALL = "slow", "one picture", "all"
PACKED = "packed weights"
WAYS: dict[str, tuple[Way, str]] = {
    # name: (way, how many questions it answers a round)
    "fewer tokens": (one_at_a_time, SLOW),
    "batching": (batching, ONE_PICTURE),
    "image reuse": (image_reuse, ALL),
    "prefix reuse": (prefix_reuse, ALL),
    PACKED: (prefix_reuse, ALL),
}


# --- measuring ---


@dataclass
class Measured:
    """One way with one reducer: seconds a question in each round, and its answers."""

    reducer: str
    way: str
    seconds: list[float] = field(default_factory=list)
    answers: dict[Any, str] = field(default_factory=dict)


def measure(
    answerer: Answerer,
    packed: Answerer | None,
    requests: Sequence[Request],
    reducers: Sequence[str],
    rounds: int,
    slow: int,
    clock: Clock,
) -> list[Measured]:
    """All ways, in turn, after one round on a single picture that only warms up. No `packed` model, no such
    way."""
    pictures = list(dict.fromkeys(request.image for request in requests))
    by_picture = {image: [one for one in requests if one.image == image] for image in pictures}
    work: list[tuple[Measured, Way, str]] = [(Measured(DENSE, "one at a time"), one_at_a_time, SLOW)]
    for reducer in reducers:
        skipped = {name for name, skip in (("fewer tokens", reducer == DENSE), (PACKED, not packed)) if skip}
        work += [(Measured(reducer, n), *way) for n, way in WAYS.items() if n not in skipped]
    with tqdm(total=(rounds + 1) * len(work), desc="bench", file=sys.stderr) as bar:
        for number in range(-1, rounds):
            warm_up = number < 0
            asked = {
                SLOW: [by_picture[pictures[(number + i) % len(pictures)]][i % 18] for i in range(slow)],
                ONE_PICTURE: by_picture[pictures[number % len(pictures)]],
                ALL: by_picture[pictures[0]] if warm_up else list(requests),
            }
            for measured, way, how_many in work:
                asks = packed if measured.way == PACKED else answerer
                asks.model.set_reducer(measured.reducer)
                chosen = asked[how_many][:1] if warm_up and how_many != ALL else asked[how_many]
                synchronise(asks.model.device)
                start = clock()
                answers = way(asks, chosen)
                synchronise(asks.model.device)
                if not warm_up:
                    measured.seconds.append((clock() - start) / len(chosen))
                    measured.answers |= answers
                bar.update()
    return [measured for measured, _, _ in work]


def ratio(before: Measured, after: Measured) -> float:
    """Median over rounds."""
    return float(np.median(np.array(before.seconds) / np.array(after.seconds)))


def disagreements(results: Sequence[Measured]) -> int:
    """Answers in which the ways of one reducer differ (float32: none should)."""
    wrong = 0
    for one in results:
        full = next(r for r in results[::-1] if r.reducer == one.reducer)
        wrong += sum(full.answers.get(key, text) != text for key, text in one.answers.items())
    return wrong


def report(results: Sequence[Measured]) -> list[dict[str, Any]]:
    """A row per way: questions a second, its own factor, and the factors so far."""
    dense, *others = results
    rows = [as_row(dense, dense, dense, dense)]
    for reducer in dict.fromkeys(one.reducer for one in others):
        ladder = [one for one in others if one.reducer == reducer]
        same = ladder[0] if reducer != DENSE else dense
        for before, after in zip([dense, *ladder], ladder, strict=False):
            rows.append(as_row(after, before, dense, same))
    return rows


def as_row(one: Measured, before: Measured, dense: Measured, same: Measured) -> dict[str, Any]:
    p25, p50, p75 = np.percentile(one.seconds, (25, 50, 75))
    return {
        "reducer": one.reducer,
        "way": one.way,
        "questions_per_second": 1 / p50,
        "seconds_a_question": {"p25": p25, "p50": p50, "p75": p75, "rounds": one.seconds},
        "factor": ratio(before, one),
        "against_one_at_a_time": ratio(dense, one),
        "against_one_at_a_time_with_this_reducer": ratio(same, one),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    head = ("reducer", "way", "questions/s", "this step", "against 576 tokens", "against this reducer")
    cells = [
        (
            row["reducer"],
            row["way"],
            f"{row['questions_per_second']:.2f}",
            f"{row['factor']:.2f}x",
            f"{row['against_one_at_a_time']:.2f}x",
            f"{row['against_one_at_a_time_with_this_reducer']:.2f}x",
        )
        for row in rows
    ]
    return render(head, cells)


# --- padding ---


@dataclass(frozen=True)
class Shape:
    """A benchmark as the batching sees it. Words are drawn, their numbers of tokens with them.

    Attributes:
        questions: in all; a process gets them in units of whole pictures.
        a_picture: questions a picture, mean.
        tokens: of a question with what follows it: (least, mean beyond that, exponential).
    """

    questions: int
    a_picture: float
    tokens: tuple[int, float]


SHAPES = {
    "pope": Shape(8910, 17.8, (24, 2)),
    "vqav2": Shape(107_394, 2.9, (26, 4)),
    "textvqa": Shape(5000, 1.58, (40, 45)),  # the OCR tokens have a long tail
}
VISUAL = {"none": (576, 0), "prumerge+": (144, 30), "prumerge": (32, 10)}
"""Visual tokens an image: mean and standard deviation."""


@dataclass
class DryRun:
    """Stands in for an Answerer and counts passes: `seen`, `asked` are (tokens, tokens with padding)."""

    batch_tokens: int
    head: Tensor = field(default_factory=lambda: torch.zeros(35, dtype=torch.long))
    generation: Generation = field(default_factory=Generation)
    seen: list[tuple[int, int]] = field(default_factory=list)
    asked: list[tuple[int, int]] = field(default_factory=list)

    def visual_length(self, visual: Tensor) -> int:
        return len(visual)

    def see(self, images: Sequence[Tensor]) -> Prefix:
        lengths = [len(image) for image in images]
        for part in batches(lengths, lambda longest: len(lengths)):
            self.seen.append((sum(lengths[part]), len(lengths[part]) * max(lengths[part])))
        return Prefix((), torch.ones(len(images), len(self.head) + max(lengths), dtype=torch.bool))

    def cut(self, ids: Sequence[Tensor], beginnings: Prefix, rows: Sequence[int]) -> list[Tensor]:
        return list(ids)

    def answer_after(self, beginnings: Prefix, ids: Sequence[Tensor], rows: Sequence[int]) -> list[str]:
        self.asked.append((sum(map(len, ids)), len(ids) * max(map(len, ids))))
        return [""] * len(ids)


def padding(shape: Shape, visual: tuple[float, float], batch_tokens: int, seed: int = 0) -> dict[str, float]:
    """Parts of what is computed that are padding, over a whole benchmark: pictures, questions, both."""
    rng = np.random.default_rng(seed)
    pictures = np.sort(rng.integers(0, round(shape.questions / shape.a_picture), shape.questions))
    least, beyond = shape.tokens
    lengths = least + rng.exponential(beyond, shape.questions).astype(int)
    units = units_of([str(picture) for picture in pictures], unit_size(shape.questions))
    run = DryRun(batch_tokens)
    starts = np.flatnonzero(np.diff(units, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(units)], strict=True):
        ready = [
            Ready(index, Path(str(pictures[index])), torch.empty(lengths[index]), shares_head=True)
            for index in range(start, end)
        ]
        counts = {one.image: max(4, round(rng.normal(*visual))) for one in ready}
        tokens = {image: torch.empty(count, 0) for image, count in sorted(counts.items())}
        answer_all(ready, tokens, run, lambda batch, texts: None)

    def part(passes: Sequence[tuple[int, int]]) -> float:
        real, padded = np.array(passes).sum(0)
        return float(1 - real / padded)

    return {"pictures": part(run.seen), "questions": part(run.asked), "both": part(run.seen + run.asked)}


def padding_report(batch_tokens: int) -> list[dict[str, Any]]:
    return [
        {"set": name, "reducer": reducer, **padding(shape, visual, batch_tokens)}
        for name, shape in SHAPES.items()
        for reducer, visual in VISUAL.items()
    ]


# --- the command ---


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model-path", default="checkpoints/mini-lora")
    parser.add_argument("--model-base", default="checkpoints/mini-base")
    parser.add_argument("--conv-mode")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--root", type=Path, default=Path("playground/data/eval-mini"))
    parser.add_argument("--reducers", nargs="+", default=["prumerge", "prumerge+", DENSE], metavar="SPEC")
    parser.add_argument("--images", type=int, default=8, help="pictures with all their questions")
    parser.add_argument("--slow", type=int, default=4, help="questions a round, asked one at a time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall")
    parser.add_argument("--padding", action="store_true", help="measure padding instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def load(args: argparse.Namespace, *, packed: bool) -> Answerer:
    name = get_model_name_from_path(args.model_path)
    tokenizer, model, image_processor, _ = load_pretrained_model(
        args.model_path, args.model_base or None, name, device=args.device, reducer=DENSE, packed=packed
    )
    return Answerer(
        model,
        tokenizer,
        image_processor,
        args.conv_mode or default_conv_mode(name, tokenizer),
        Generation(max_new_tokens=args.max_new_tokens),
        batch_tokens=args.batch_tokens,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.padding:
        rows = padding_report(args.batch_tokens or 8192)
        head = ("set", "reducer", "pictures", "questions", "both")
        print(
            render(head, [(r["set"], r["reducer"], *(f"{r[name]:.1%}" for name in head[2:])) for r in rows])
        )
        write(args.json, {"padding": rows})
        return 0
    if args.clock == "cpu" and args.device != "cpu":
        raise UserError("--clock cpu counts what a CPU does; on a GPU use --clock wall.")
    answerer = load(args, packed=False)
    packed = load(args, packed=True) if can_pack(answerer.model.device, answerer.model.dtype) else None
    benchmark = benchmarks.get("pope")
    requests = requests_of(benchmark, benchmark.load(args.root), benchmark.protocols[0])
    chosen = set(list(dict.fromkeys(request.image for request in requests))[: args.images])
    requests = [request for request in requests if request.image in chosen]
    results = measure(answerer, packed, requests, args.reducers, args.rounds, args.slow, CLOCKS[args.clock])
    rows = report(results)
    print(table(rows))
    different = disagreements(results)
    answered = sum(len(one.answers) for one in results)
    print(f"{different} of {answered} answers differ between the ways of a reducer")
    circumstances = {
        "command": " ".join(["python", "scripts/bench_eval.py", *(sys.argv[1:] if argv is None else argv)]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{hardware.cpu_name()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "clock": args.clock,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(answerer.model.dtype).removeprefix("torch."),
        "questions": len(requests),
        "images": len(chosen),
        "batch_tokens": answerer.batch_tokens,
        "answers_that_differ": different,
    }
    write(args.json, {**circumstances, "rows": rows})
    return 0


def write(file: Path | None, content: dict[str, Any]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{file.name}.part")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(file)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
