"""`python -m llava.eval.eval_science_qa`: ScienceQA accuracy, with LLaVA's two output files.

`--output-file` gets every question with its parsed answer, `--output-result` the summary. Missing and
duplicate answers are named, and then nothing is written (exit status 1). Which questions have a picture is
read from problems.json.
"""

import argparse
import json
import sys
from pathlib import Path

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import read_answers
from llava.eval.benchmarks import scienceqa
from llava.eval.benchmarks.base import LETTERS, write_text
from llava.eval.score import report_problems


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument(
        "--base-dir", type=Path, required=True, help="folder of problems.json and pid_splits.json"
    )
    flags.add_argument("--result-file", type=Path, required=True, help="answers")
    flags.add_argument("--output-file", type=Path, required=True)
    flags.add_argument("--output-result", type=Path, required=True)
    flags.add_argument("--split", default="test")
    flags.add_argument("--options", default=list("ABCDE"), help="accepted; the letters are A to E")
    return flags


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    benchmark = benchmarks.get("scienceqa")
    try:
        problems_of, ids = scienceqa.read_problems(args.base_dir, args.split)
        samples = scienceqa.samples_of(
            scienceqa.made_rows(problems_of, ids), problems_of, args.base_dir, args.base_dir
        )
        rows, problems = read_answers([args.result_file])
        joined, wrong = benchmark.join(samples, rows)
        if problems + wrong:
            report_problems(problems + wrong)
            return 1
        metrics = benchmark.score(samples, [row.text for row in joined])["metrics"]
    except UserError as error:
        print(f"eval_science_qa: {error}", file=sys.stderr)
        return 2
    details: dict[str, list[dict]] = {"correct": [], "incorrect": []}
    parsed: dict[str, int] = {}
    for sample, row in zip(samples, joined, strict=True):
        answer, choices, with_image = sample.reference
        letter = scienceqa.read_answer(row.text)
        parsed[sample.id] = LETTERS.index(letter) if letter and letter in LETTERS[:choices] else -1
        details["correct" if parsed[sample.id] == answer else "incorrect"].append(
            {
                "question_id": sample.id,
                "parsed_ans": letter or "FAILED",
                "ground_truth": LETTERS[answer],
                "question": row.prompt,
                "pred": row.text,
                "is_multimodal": with_image,
            }
        )
    summary = {
        "acc": metrics["accuracy"],
        "correct": len(details["correct"]),
        "count": len(samples),
        "results": parsed,
        "outputs": {sample.id: row.text for sample, row in zip(samples, joined, strict=True)},
    }
    right, images = int(metrics["img_right"]), int(metrics["img_n"])
    image_accuracy = "-" if not images else f"{metrics['img_accuracy']:.2f}%"
    print(
        f"Total: {summary['count']}, Correct: {summary['correct']}, Accuracy: {summary['acc']:.2f}%, "
        f"IMG-Accuracy: {image_accuracy} ({right} of {images})"
    )
    write_text(args.output_file, json.dumps(details, indent=2))
    write_text(args.output_result, json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
