"""`llava submit BENCHMARK --root ROOT --answers FILE... --out FILE`: the file the benchmark's server takes.

Exit status 0: written; 1: the answers are incomplete, duplicate, torn or unknown (all named, nothing
written) unless --partial; 2: bad input. The file appears whole or not at all.
"""

import argparse
import sys
from pathlib import Path

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import read_answers
from llava.eval.provenance import mixed_runs
from llava.eval.score import add_common_arguments, report_problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="file to write")


def run(args: argparse.Namespace) -> int:
    benchmark = benchmarks.get(args.benchmark)
    if benchmark.write is None:
        raise UserError(f"{benchmark.name} has no server; `llava score {benchmark.name}` scores it here.")
    rows, problems = read_answers(args.answers)
    problems += mixed_runs(args.answers)
    samples = benchmark.load(args.root, args.questions)
    others = benchmark.optional(args.root, samples)
    joined, wrong = benchmark.join(samples, rows, others)
    problems += wrong
    if problems and not args.partial:
        answered = sum(row is not None for row in joined[: len(samples)])
        print(
            f"llava submit {benchmark.name}: nothing written. {answered:,} of {len(samples):,} questions "
            "have an answer, and this is wrong (--partial writes what there is):",
            file=sys.stderr,
        )
        report_problems(problems)
        return 1
    answers = {
        str(sample.id): row.text for sample, row in zip([*samples, *others], joined, strict=True) if row
    }
    benchmark.write(args.out, args.root, answers)
    print(f"{args.out}: {len(answers):,} answers of {len(samples):,} questions asked")
    if problems:
        report_problems(problems)
    return 0
