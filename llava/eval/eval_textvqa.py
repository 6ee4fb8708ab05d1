"""`python -m llava.eval.eval_textvqa`: TextVQA accuracy, as LLaVA's script prints it.

Every question of the annotation file needs exactly one answer; what is missing or unknown is named (status
1).
"""

import argparse
import sys
from pathlib import Path

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import read_answers
from llava.eval.benchmarks import textvqa
from llava.eval.benchmarks.base import Sample
from llava.eval.score import report_problems


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--annotation-file", type=Path, required=True, help="TextVQA_0.5.1_val.json")
    which = flags.add_mutually_exclusive_group(required=True)
    which.add_argument("--result-file", type=Path, help="answers")
    which.add_argument("--result-dir", type=Path, help="folder of answers files")
    return flags


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        files = [args.result_file] if args.result_file else sorted(args.result_dir.glob("*.jsonl"))
        samples = textvqa.from_annotations(args.annotation_file, Path())
        return max([score(file, samples) for file in files], default=0)
    except UserError as error:
        print(f"eval_textvqa: {error}", file=sys.stderr)
        return 2


def score(file: Path, samples: list[Sample]) -> int:
    benchmark = benchmarks.get("textvqa")
    rows, problems = read_answers([file])
    joined, wrong = benchmark.join(samples, rows)
    print(file.stem)
    if problems + wrong:
        report_problems(problems + wrong)
        return 1
    accuracy = benchmark.score(samples, [row.text for row in joined])["metrics"]["accuracy"]
    print(f"Samples: {len(rows)}\nAccuracy: {accuracy:.2f}%\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
