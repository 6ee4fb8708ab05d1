"""`llava mini demo`: real pictures, the same question with every visual token and with few.

For each picture and reducer: one row of the table on stdout (visual tokens, times, answer) and one overlay in
OUT: kept patches bright, merged ones tinted by the token they went to. Then a small POPE: yes-no questions
about composed scenes, in the benchmark's own file formats, by the commands the real one is run with.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from llava.eval.benchmarks.base import SHORT
from llava.files import read_json

MODEL, BASE = "checkpoints/mini-lora", "checkpoints/mini-base"
PICTURES = Path("playground/pictures")
REDUCERS = ("none", "prumerge+", "prumerge+(tokens=144)", "prumerge")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pictures", type=Path, default=PICTURES, help="folder with questions.json (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/quickstart"), help="where the overlays go")
    parser.add_argument(
        "--pope", type=int, default=8, help="pictures of the small POPE, 0: none (default: 8)"
    )


def run(args: argparse.Namespace) -> int:
    print("\n".join(ask_all(args.pictures, args.out)))
    print(f"overlays: {args.out}/", file=sys.stderr)
    if args.pope:
        mini_pope(args.out / f"eval-mini-{args.pope}", args.pope)
    return 0


def ask_all(folder: Path, out: Path) -> list[str]:
    """Lines of the table, a block per picture; overlays are written into `out`."""
    from llava.engine import ModelSource, Request, finish
    from llava.mm_utils import load_image
    from llava.pictures import overlay, squares

    asked = read_json(folder / "questions.json")  # file name -> question
    questions = [(folder / name, question) for name, question in asked.items()]
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    with tqdm(total=len(questions) * len(REDUCERS) + 1, desc="loading the model", file=sys.stderr) as bar:
        engine = ModelSource(MODEL, BASE, conv_mode="smollm2", reducer="none").load()
        first = Request(text=questions[0][1] + SHORT, images=[questions[0][0]], max_new_tokens=4)
        finish(engine.stream(first))  # warm-up: the first call pays for allocations
        bar.update()
        for path, question in questions:
            image = load_image(path)
            head = f"  {'reducer':<26} {'visual tokens':>13} {'prefill ms':>11} {'total ms':>9}  answer"
            lines += [""] * bool(lines) + [f"{path.stem}: {question}", head]
            for reducer in REDUCERS:
                bar.set_description(f"{path.stem}, {reducer}")
                request = Request(text=question + SHORT, images=[image], max_new_tokens=16, reducer=reducer)
                answer = finish(engine.stream(request))
                took, tokens = answer.timing, sum(answer.visual_tokens)
                times = f"{took.prefill_ms:>11.0f} {took.total_ms:>9.0f}"
                lines.append(f"  {reducer:<26} {tokens:>13} {times}  {answer.text}")
                look = engine.look(image, request)
                (seen,) = squares(look.pixels, engine.image_processor)
                picture = overlay(seen, look.reduced[0], look.features.grid)
                picture.save(out / f"{path.stem}-{reducer.replace('+', '-plus')}.png")
                bar.update()
    return lines


def mini_pope(root: Path, pictures: int) -> None:
    """F1 on held-out scenes, 18 questions each, per reducer; random keeps as many as prumerge."""
    from llava.engine import ModelSource
    from llava.eval import benchmarks
    from llava.eval.loop import Job, answer
    from llava.eval.run import requests_of
    from llava.eval.score import score
    from llava.mini.benchmarks import generate

    generate(root, seed=0, number=pictures)
    benchmark = benchmarks.get("pope")
    requests, lines = requests_of(
        benchmark, benchmark.load(root), benchmark.protocols[0], max_new_tokens=4, seed=0
    )
    print(f"\nmini-POPE: {len(requests)} questions about {pictures} composed scenes it never saw")
    print(f"  {'reducer':<26} {'visual tokens':>13} {'F1':>6} {'95 %':>13} {'questions/s':>12}")
    tokens: dict[str, float] = {}
    for reducer in ("none", "prumerge+", "prumerge", "random"):
        spec = reducer if reducer != "random" else f"random(tokens={round(tokens['prumerge'])})"
        file = root / "pope" / "answers" / f"{spec}.jsonl"
        source = ModelSource(MODEL, BASE, conv_mode="smollm2", reducer=spec)
        took = answer(Job(requests, lines, source, answers=file, about={}))
        tokens[spec] = took["visual_tokens"]["mean"]
        headline = score(benchmark, root, [file])["headline"]
        low, high = headline["interval"]
        print(
            f"  {spec:<26} {tokens[spec]:>13.1f} {headline['value']:>6.1f} {low:>6.1f}-{high:<6.1f} "
            f"{took['questions_per_second']:>12.2f}"
        )
