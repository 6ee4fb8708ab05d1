"""`llava mini demo`: real pictures, the same question with every visual token and with few.

For each picture and reducer: one row of the table on stdout (visual tokens, times, answer) and one overlay in
OUT: kept patches bright, merged ones tinted by the token they went to. Then a small POPE: yes-no questions
about composed scenes, in the benchmark's own file formats, by the commands the real one is run with.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from llava.errors import UserError

MODEL = Path("checkpoints/mini-lora")
BASE = Path("checkpoints/mini-base")
PICTURES = Path("playground/pictures")
REDUCERS = ("none", "prumerge+", "prumerge+(max_tokens=144)", "prumerge")
SHORT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Row:
    """One answer: a line of the table."""

    picture: str
    question: str
    reducer: str
    visual_tokens: int
    prefill_ms: float
    total_ms: float
    answer: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", type=Path, default=MODEL)
    parser.add_argument("--model-base", type=Path, default=BASE)
    parser.add_argument(
        "--pictures", type=Path, default=PICTURES, help="folder with questions.json (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="where the overlays go")
    parser.add_argument(
        "--pope", type=int, default=8, help="pictures of the small POPE, 0: none (default: 8)"
    )
    parser.add_argument("--json", action="store_true", help="print rows as JSON lines instead of a table")


def run(args: argparse.Namespace) -> int:
    questions = read_questions(args.pictures)
    rows = answer_all(args, questions)
    if args.json:
        for row in rows:
            print(json.dumps(vars(row)))
    else:
        print(table(rows))
    print(f"overlays: {args.out}/", file=sys.stderr)
    if args.pope:
        mini_pope(args)
    return 0


def read_questions(folder: Path) -> list[tuple[Path, str]]:
    """(picture, question) pairs of a folder's questions.json: {file name: question}."""
    index = folder / "questions.json"
    if not index.is_file():
        raise UserError(
            f"{index} is missing; it maps picture names to questions. Run this from the project's root."
        )
    return [(folder / name, question) for name, question in json.loads(index.read_text()).items()]


def answer_all(args: argparse.Namespace, questions: list[tuple[Path, str]]) -> list[Row]:
    from llava.analysis.show import overlay
    from llava.engine import ModelSource, Request, finish
    from llava.mm_utils import load_image, process_images

    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with tqdm(total=len(questions) * len(REDUCERS) + 1, desc="loading the model", file=sys.stderr) as bar:
        source = ModelSource(str(args.model_path), str(args.model_base), conv_mode="smollm2", reducer="none")
        engine = source.load()
        model = engine.model
        first = Request(text=questions[0][1] + SHORT, images=[questions[0][0]], max_new_tokens=4)
        finish(engine.stream(first))  # warm-up: the first call pays for allocations
        bar.update()
        for path, question in questions:
            image = load_image(path)
            for reducer in REDUCERS:
                bar.set_description(f"{path.stem}, {reducer}")
                model.set_reducer(reducer)
                answer = finish(
                    engine.stream(Request(text=question + SHORT, images=[image], max_new_tokens=16))
                )
                if answer.problem:
                    raise UserError(f"{path}: {answer.problem}")
                took = answer.timing
                tokens = sum(answer.visual_tokens)
                rows.append(
                    Row(path.stem, question, reducer, tokens, took.prefill_ms, took.total_ms, answer.text)
                )
                features = model.get_vision_tower()(
                    process_images([image], engine.image_processor, model.config)
                )
                picture = overlay(image, model.reducer(features), features.grid)
                picture.save(args.out / f"{path.stem}-{reducer.replace('+', '-plus')}.png")
                bar.update()
    return rows


def table(rows: list[Row]) -> str:
    """The rows for people, one block per picture."""
    lines, last = [], None
    for row in rows:
        if row.picture != last:
            lines += ["", f"{row.picture}: {row.question}"]
            lines.append(
                f"  {'reducer':<26} {'visual tokens':>13} {'prefill ms':>11} {'total ms':>9}  answer"
            )
            last = row.picture
        times = f"{row.prefill_ms:>11.0f} {row.total_ms:>9.0f}"
        lines.append(f"  {row.reducer:<26} {row.visual_tokens:>13} {times}  {row.answer}")
    return "\n".join(lines[1:])


def mini_pope(args: argparse.Namespace) -> None:
    """F1 on `--pope` held-out scenes, 18 questions each, per reducer; random keeps as many as prumerge."""
    from llava.engine import ModelSource
    from llava.eval import benchmarks
    from llava.eval.loop import Job, answer
    from llava.eval.run import requests_of
    from llava.eval.score import score
    from llava.mini.benchmarks import generate
    from llava.mini.evaluate import with_count

    root = args.out / f"eval-mini-{args.pope}"
    generate(root, seed=0, number=args.pope)
    benchmark = benchmarks.get("pope")
    requests, lines = requests_of(
        benchmark, benchmark.load(root), benchmark.protocols[0], max_new_tokens=4, seed=0
    )
    print(f"\nmini-POPE: {len(requests)} questions about {args.pope} composed scenes it never saw")
    print(f"  {'reducer':<26} {'visual tokens':>13} {'F1':>6} {'95 %':>13} {'questions/s':>12}")
    tokens: dict[str, float] = {}
    for reducer in ("none", "prumerge+", "prumerge", "random"):
        spec = with_count(reducer, tokens)
        file = root / "pope" / "answers" / f"{spec}.jsonl"
        source = ModelSource(str(args.model_path), str(args.model_base), conv_mode="smollm2", reducer=spec)
        took = answer(Job(requests, lines, source, answers=file, about={}))
        tokens[spec] = took["visual_tokens"]["mean"]
        headline = score(benchmark, root, [file])["headline"]
        low, high = headline["interval"]
        print(
            f"  {spec:<26} {tokens[spec]:>13.1f} {headline['value']:>6.1f} {low:>6.1f}-{high:<6.1f} "
            f"{took['questions_per_second']:>12.2f}"
        )
