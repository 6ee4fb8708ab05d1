"""How many questions a second the evaluation answers, ingredient by ingredient, on a set of POPE's shape.

    python scripts/bench_eval.py [--rounds 5] [--images 8] [--clock cpu] [--json docs/measurements/eval.json]

The ways, each with what the one before it has:

    one at a time    a loop over questions: read the picture, encode it, ask, with every visual token
    fewer tokens     the reducer behind the tower
    batching         questions of similar length together, each with its own copy of the picture
    image reuse      a picture is read and encoded once for all its questions
    prefix reuse     so is what the language model makes of it: the engine of `llava eval`

One process, one thread unless OMP_NUM_THREADS says otherwise. The ways take turns within each round, so that
a machine that slows down slows all of them alike; a factor is the median over rounds of the ratio within a
round. The slow ways answer fewer questions a round. All answer alike (checked). `--clock cpu` counts
processor time, which a busy machine disturbs less. The questions are made at the first run, into --root.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import sys
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
from llava.engine import LocalEngine, ModelSource, Request
from llava.engine.batching import batches
from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.run import requests_of
from llava.files import write_json
from llava.mini.benchmarks import generate
from llava.mm_utils import tokenizer_image_token

DENSE = "none"
Answers = dict[Any, str]


# --- the ways ---


@torch.inference_mode()
def whole_prompts(engine: LocalEngine, requests: Sequence[Request], visual: Sequence[Tensor]) -> Answers:
    """Answers of requests with the visual embeddings of their pictures, in batches of whole prompts."""
    ids = [
        tokenizer_image_token(engine.prompt(one), engine.tokenizer, return_tensors="pt") for one in requests
    ]
    lengths = [len(one) - 1 + len(tokens) for one, tokens in zip(ids, visual, strict=True)]
    order = sorted(range(len(ids)), key=lambda place: -lengths[place])
    new = requests[0].max_new_tokens
    answers: Answers = {}
    for part in batches(
        [lengths[place] for place in order], lambda rows, most: rows * (most + new) <= engine.batch_tokens
    ):
        places = order[part]
        out = engine.model.generate(
            [ids[place] for place in places],
            visual_embeds=[visual[place] for place in places],
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=engine.tokenizer.pad_token_id,
        )
        texts = engine.tokenizer.batch_decode(out, skip_special_tokens=True)
        answers |= {requests[place].id: text.strip() for place, text in zip(places, texts, strict=True)}
    return answers


def encoded(engine: LocalEngine, requests: Sequence[Request]) -> list[Tensor]:
    """The visual embeddings of each request's picture, read and encoded for each."""
    return engine.encode([one.images[0] for one in requests])


def one_at_a_time(engine: LocalEngine, requests: Sequence[Request]) -> Answers:
    answers: Answers = {}
    for request in requests:
        answers |= whole_prompts(engine, [request], encoded(engine, [request]))
    return answers


def batching(engine: LocalEngine, requests: Sequence[Request]) -> Answers:
    return whole_prompts(engine, requests, encoded(engine, requests))


def image_reuse(engine: LocalEngine, requests: Sequence[Request]) -> Answers:
    first = list({request.images: request for request in requests}.values())
    tokens = dict(zip((one.images for one in first), encoded(engine, first), strict=True))
    return whole_prompts(engine, requests, [tokens[request.images] for request in requests])


def prefix_reuse(engine: LocalEngine, requests: Sequence[Request]) -> Answers:
    return {answer.id: answer.text for answer in engine.answer(requests)}


Way = Callable[[LocalEngine, Sequence[Request]], Answers]
SLOW, ONE_PICTURE, ALL = "slow", "one picture", "all"
WAYS: dict[str, tuple[Way, str]] = {
    # name: (way, how many questions it answers a round)
    "fewer tokens": (one_at_a_time, SLOW),
    "batching": (batching, ONE_PICTURE),
    "image reuse": (image_reuse, ALL),
    "prefix reuse": (prefix_reuse, ALL),
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
    engine: LocalEngine,
    requests: Sequence[Request],
    reducers: Sequence[str],
    rounds: int,
    slow: int,
    clock: Clock,
) -> list[Measured]:
    """All ways, in turn, after one round on a single picture that only warms up."""
    pictures = list(dict.fromkeys(request.images for request in requests))
    by_picture = {images: [one for one in requests if one.images == images] for images in pictures}
    work: list[tuple[Measured, Way, str]] = [(Measured(DENSE, "one at a time"), one_at_a_time, SLOW)]
    for reducer in reducers:
        ways = {name: way for name, way in WAYS.items() if reducer != DENSE or way[0] is not one_at_a_time}
        work += [(Measured(reducer, name), *way) for name, way in ways.items()]
    with tqdm(total=(rounds + 1) * len(work), desc="bench", file=sys.stderr) as bar:
        for number in range(-1, rounds):
            warm_up = number < 0
            asked = {
                SLOW: [by_picture[pictures[(number + i) % len(pictures)]][i % 18] for i in range(slow)],
                ONE_PICTURE: by_picture[pictures[number % len(pictures)]],
                ALL: by_picture[pictures[0]] if warm_up else list(requests),
            }
            for measured, way, how_many in work:
                engine.model.set_reducer(measured.reducer)
                chosen = asked[how_many][:1] if warm_up and how_many != ALL else asked[how_many]
                synchronise(engine.model.device)
                start = clock()
                answers = way(engine, chosen)
                synchronise(engine.model.device)
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
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def read_requests(args: argparse.Namespace) -> list[Request]:
    """POPE's questions about the first `--images` pictures; a set is made where there is none."""
    benchmark = benchmarks.get("pope")
    if not args.root.exists():
        generate(args.root, seed=0, number=50)  # as `llava mini benchmarks` does
    if not (args.root / benchmark.files[0].path).exists():
        raise UserError(
            f"{args.root} has no POPE; `llava mini benchmarks --out DIR` makes a set for --root DIR."
        )
    samples = benchmark.load(args.root)
    how_long = {"max_new_tokens": args.max_new_tokens}
    requests, _ = requests_of(benchmark, samples, benchmark.protocols[0], **how_long)
    chosen = set(list(dict.fromkeys(request.images for request in requests))[: args.images])
    return [request for request in requests if request.images in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.clock == "cpu" and args.device != "cpu":
        raise UserError("--clock cpu counts what a CPU does; on a GPU use --clock wall.")
    requests = read_requests(args)  # before the model: it may have to be made, or be missing
    source = ModelSource(
        args.model_path, args.model_base or None, conv_mode=args.conv_mode, device=args.device, reducer=DENSE
    )
    engine = source.load(batch_tokens=args.batch_tokens)
    results = measure(engine, requests, args.reducers, args.rounds, args.slow, CLOCKS[args.clock])
    rows = report(results)
    print(table(rows))
    different = disagreements(results)
    answered = sum(len(one.answers) for one in results)
    print(f"{different} of {answered} answers differ between the ways of a reducer")
    if args.json is not None:
        circumstances = {
            "command": " ".join(
                ["python", "scripts/bench_eval.py", *(sys.argv[1:] if argv is None else argv)]
            ),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{hardware.cpu_name()}, {os.cpu_count()} cores",
            "threads": torch.get_num_threads(),
            "clock": args.clock,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": str(engine.model.dtype).removeprefix("torch."),
            "questions": len(requests),
            "images": args.images,
            "batch_tokens": engine.batch_tokens,
            "answers_that_differ": different,
        }
        write_json(args.json, {**circumstances, "rows": rows})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
