"""`llava submit BENCHMARK --root ROOT --answers FILE... --out FILE`: the file the benchmark's server takes.

Exit status 0: written; 1: the answers are incomplete, duplicate, torn or unknown (all named, nothing
written) unless --partial; 2: bad input. The file appears whole or not at all.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import Row, read_answers
from llava.eval.benchmarks.base import Benchmark
from llava.eval.provenance import mixed_runs
from llava.eval.questions import Sample
from llava.eval.score import add_common_arguments, report_problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="file to write")


def run(args: argparse.Namespace) -> int:
    benchmark = benchmarks.get(args.benchmark)
    if benchmark.write is None:
        raise UserError(f"{benchmark.name} has no server; `llava score {benchmark.name}` scores it here.")
    rows, problems = read_answers(args.answers)
    samples = benchmark.load(args.root, args.questions)
    return upload(
        benchmark,
        (rows, problems + mixed_runs(args.answers)),
        samples,
        benchmark.optional(args.root, samples),
        args.out,
        lambda answers: benchmark.write(args.out, args.root, answers),
        partial=args.partial,
    )


def upload(
    benchmark: Benchmark,
    read: tuple[list[Row], list[str]],
    samples: Sequence[Sample],
    others: Sequence[Sample],
    out: Path,
    write: Callable[[dict[str, str]], None],
    *,
    partial: bool = False,
) -> int:
    """Calls `write({id: answer})` if every one of `samples` has its answer, or for what there is; the status.

    `read`: answers and what is wrong with them; `others` may be answered as well.
    """
    rows, problems = read
    joined, wrong = benchmark.join(samples, rows, others)
    problems = problems + wrong
    if problems and not partial:
        answered = sum(row is not None for row in joined[: len(samples)])
        print(
            f"{out}: nothing written. {answered:,} of {len(samples):,} questions have an answer, and this is "
            "wrong (`llava submit --partial` writes what there is):",
            file=sys.stderr,
        )
        report_problems(problems)
        return 1
    asked = [*samples, *others]
    answers = {str(sample.id): row.text for sample, row in zip(asked, joined, strict=True) if row}
    write(answers)
    print(f"{out}: {len(answers):,} answers of {len(samples):,} questions asked")
    report_problems(problems)
    return 0
