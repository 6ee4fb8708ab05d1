"""LLaVA's scoring and converting scripts: their flags and their files, on the benchmarks of this package.

`llava/eval/eval_pope.py`, `eval_textvqa.py`, `eval_science_qa.py` and `scripts/convert_*.py` call these
functions; each returns its exit status. Unlike the originals they join by id and refuse answers that are
incomplete, duplicate, torn or unknown: these are named, nothing is written, and the status is 1. `llava
score` and `llava submit` do the same with one set of flags for all.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from llava.errors import UserError, exit_status
from llava.eval.answers import Row, join, read_answers
from llava.eval.benchmarks import base, gqa, mm_vet, mmbench, pope, scienceqa, seed, textvqa, vizwiz, vqav2
from llava.eval.questions import LETTERS, Sample, read_questions
from llava.eval.score import as_table, report_problems
from llava.files import write_text


def main(script: Callable[[list[str] | None], int]) -> None:
    """The whole body of a script."""
    sys.exit(exit_status(lambda: script(None), name=Path(sys.argv[0]).stem))


def eval_pope(argv: list[str] | None = None) -> int:
    """POPE's figures category by category."""
    args = parse(argv, "--annotation-dir", "--question-file", "--result-file")
    samples = pope.load(Path(), Path(args.question_file), Path(args.annotation_dir))
    rows = read_joined(pope.BENCHMARK, samples, args.result_file)
    if rows is None:
        return 1
    figures = pope.BENCHMARK.score(samples, [row.text for row in rows])["metrics"]["by_category"]
    for category in ("adversarial", "popular", "random"):
        one = figures[category]
        print(f"Category: {category}, # samples: {one['n']:.0f}")
        print("TP\tFP\tTN\tFN\t")
        print("\t".join(f"{one[cell]:.0f}" for cell in ("TP", "FP", "TN", "FN")))
        print(f"Accuracy: {one['accuracy']}\nPrecision: {one['precision']}\nRecall: {one['recall']}")
        print(f"F1 score: {one['f1']}\nYes ratio: {one['yes_ratio']}")
        print(", ".join(f"{one[key]:.3f}" for key in ("f1", "accuracy", "precision", "recall", "yes_ratio")))
        print("====================================")
    return 0


def eval_textvqa(argv: list[str] | None = None) -> int:
    """TextVQA accuracy of an answers file, or of each in a folder."""
    args = parse(argv, "--annotation-file", result_file="", result_dir="")
    if bool(args.result_file) == bool(args.result_dir):
        raise UserError("give --result-file FILE or --result-dir FOLDER.")
    samples = textvqa.read_labels(Path(args.annotation_file), Path())
    status = 0
    for file in [args.result_file] if args.result_file else sorted(Path(args.result_dir).glob("*.jsonl")):
        print(Path(file).stem)
        rows = read_joined(textvqa.BENCHMARK, samples, file)
        if rows is None:
            status = 1
            continue
        figures = textvqa.BENCHMARK.score(samples, [row.text for row in rows])["metrics"]
        print(f"Samples: {len(rows)}\nAccuracy: {figures['accuracy']:.2f}%\n")
    return status


def eval_science_qa(argv: list[str] | None = None) -> int:
    """ScienceQA accuracy. `--output-file` gets every question with its parsed answer, `--output-result` the
    summary. Which questions have a picture is read from problems.json."""
    flags = ("--base-dir", "--result-file", "--output-file", "--output-result")
    args = parse(argv, *flags, split="test", options="")  # the options are always A to E
    samples = scienceqa.read_labels(Path(args.base_dir), args.split)
    rows = read_joined(scienceqa.BENCHMARK, samples, args.result_file)
    if rows is None:
        return 1
    metrics = scienceqa.BENCHMARK.score(samples, [row.text for row in rows])["metrics"]
    details: dict[str, list[dict]] = {"correct": [], "incorrect": []}
    parsed: dict[str, int] = {}
    for row, sample in zip(rows, samples, strict=True):
        right, choices, has_image = sample.reference
        letter = scienceqa.read_answer(row.text)
        index = LETTERS.index(letter) if letter else -1
        parsed[sample.id] = index if index < choices else -1
        details["correct" if index == right else "incorrect"].append(
            {
                "question_id": sample.id,
                "parsed_ans": letter or "FAILED",
                "ground_truth": LETTERS[right],
                "question": row.prompt,
                "pred": row.text,
                "is_multimodal": has_image,
            }
        )
    summary = {
        "acc": metrics["accuracy"],
        "correct": len(details["correct"]),
        "count": len(rows),
        "results": parsed,
        "outputs": {sample.id: row.text for sample, row in zip(samples, rows, strict=True)},
    }
    images = int(metrics["img_n"])
    image_accuracy = "-" if not images else f"{metrics['img_accuracy']:.2f}%"
    print(
        f"Total: {summary['count']}, Correct: {summary['correct']}, Accuracy: {summary['acc']:.2f}%, "
        f"IMG-Accuracy: {image_accuracy} ({metrics['img_right']:.0f} of {images})"
    )
    write_text(args.output_file, json.dumps(details, indent=2))
    write_text(args.output_result, json.dumps(summary, indent=2))
    return 0


def vqav2_for_submission(argv: list[str] | None = None) -> int:
    """DIR/answers/SPLIT/CKPT/merge.jsonl to DIR/answers_upload/SPLIT/CKPT.json."""
    args = parse(argv, "--ckpt", "--split", dir="./playground/data/eval/vqav2")
    folder = Path(args.dir)
    listed = folder / vqav2.TEST
    source = folder / "answers" / args.split / args.ckpt / "merge.jsonl"
    out = folder / "answers_upload" / args.split / f"{args.ckpt}.json"
    samples = read_questions(folder / f"{args.split}.jsonl", folder)
    others = vqav2.optional(folder, samples, listed)
    return convert(source, out, partial(vqav2.write, listed=listed), samples, others)


def vizwiz_for_submission(argv: list[str] | None = None) -> int:
    """Answers to the list the VizWiz server takes."""
    args = parse(argv, "--annotation-file", "--result-file", "--result-upload-file")
    questions = Path(args.annotation_file)
    samples = read_questions(questions)
    write = partial(vizwiz.write, questions=questions)
    return convert(Path(args.result_file), Path(args.result_upload_file), write, samples)


def mmbench_for_submission(argv: list[str] | None = None) -> int:
    """RESULT_DIR/EXPERIMENT.jsonl to UPLOAD_DIR/EXPERIMENT.xlsx."""
    args = parse(argv, "--annotation-file", "--result-dir", "--upload-dir", "--experiment")
    table = Path(args.annotation_file)
    source = Path(args.result_dir) / f"{args.experiment}.jsonl"
    out = Path(args.upload_dir) / f"{args.experiment}.xlsx"
    return convert(source, out, partial(mmbench.write, questions=table), mmbench.load(Path(), table))


def seed_for_submission(argv: list[str] | None = None) -> int:
    """SEED-Bench answers to the leaderboard's file, and their accuracy."""
    args = parse(argv, "--annotation-file", "--result-file", "--result-upload-file")
    samples, source = seed.read_labels(Path(args.annotation_file)), Path(args.result_file)
    status = convert(source, Path(args.result_upload_file), seed.write, samples)
    if status == 0:
        rows = read_joined(seed.BENCHMARK, samples, source)
        print("\n".join(as_table(seed.BENCHMARK.score(samples, [row.text for row in rows])["metrics"])))
    return status


def gqa_for_eval(argv: list[str] | None = None) -> int:
    """Answers to the predictions file of the official GQA script."""
    args = parse(argv, "--src", "--dst")
    return convert(Path(args.src), Path(args.dst), gqa.write)


def mmvet_for_eval(argv: list[str] | None = None) -> int:
    """Answers to the file the MM-Vet notebook grades."""
    args = parse(argv, "--src", "--dst")
    return convert(Path(args.src), Path(args.dst), mm_vet.write)


def parse(argv: list[str] | None, *required: str, **defaults: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag in required:
        parser.add_argument(flag, required=True)
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", default=default)
    return parser.parse_args(argv)


def read_joined(benchmark: base.Benchmark, samples: Sequence[Sample], file: str | Path) -> list[Row] | None:
    """The answer to each question; None where something is wrong, which is printed."""
    rows, problems = read_answers([Path(file)])
    joined, wrong = benchmark.join(samples, rows)
    report_problems(problems + wrong)
    return None if problems + wrong else joined


def convert(
    source: Path,
    out: Path,
    write: Callable[[Path, Path | None, Mapping[str, str]], None],
    samples: Sequence[Sample] | None = None,
    others: Sequence[Sample] = (),
) -> int:
    """Answers of `source` to `out`. Without `samples` nobody knows what was asked: then only torn lines and
    duplicates are found."""
    rows, problems = read_answers([source])
    if samples is None:
        samples = [Sample(number, "", None, number, "") for number in dict.fromkeys(x.id for x in rows)]
    joined, wrong = join(samples, rows, lambda row: row.id, others)
    if problems + wrong:
        print(f"{out}: not written.", file=sys.stderr)
        report_problems(problems + wrong)
        return 1
    write(out, None, {row.id: row.text for row in joined if row})
    print(f"{out}: {len(rows):,} answers")
    return 0
