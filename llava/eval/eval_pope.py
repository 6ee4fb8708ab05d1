"""`python -m llava.eval.eval_pope`: POPE's figures category by category, as LLaVA's script prints them.

Answers are joined by id and labels compared with the questions; what does not fit is refused (exit status 1).
"""

import argparse
import sys
from pathlib import Path

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import read_answers
from llava.eval.benchmarks import pope
from llava.eval.score import report_problems

ORDER = ("adversarial", "popular", "random")


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--annotation-dir", type=Path, required=True, help="folder of coco_pope_*.json")
    flags.add_argument("--question-file", type=Path, required=True)
    flags.add_argument("--result-file", type=Path, required=True, help="answers")
    return flags


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    benchmark = benchmarks.get("pope")
    try:
        samples = pope.from_files(args.question_file, args.annotation_dir, Path())
        rows, problems = read_answers([args.result_file])
        joined, wrong = benchmark.join(samples, rows)
        if problems + wrong:
            report_problems(problems + wrong)
            return 1
        figures = benchmark.score(samples, [row.text for row in joined])["metrics"]["by_category"]
    except UserError as error:
        print(f"eval_pope: {error}", file=sys.stderr)
        return 2
    for category in ORDER:
        one = figures[category]
        print(f"Category: {category}, # samples: {one['n']:.0f}")
        print("TP\tFP\tTN\tFN\t")
        print("\t".join(f"{one[cell]:.0f}" for cell in ("TP", "FP", "TN", "FN")))
        print(f"Accuracy: {one['accuracy']}\nPrecision: {one['precision']}\nRecall: {one['recall']}")
        print(f"F1 score: {one['f1']}\nYes ratio: {one['yes_ratio']}")
        print(", ".join(f"{one[key]:.3f}" for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")))
        print("====================================")
    return 0


if __name__ == "__main__":
    sys.exit(main())
