"""LLaVA's scripts/convert_*.py: the same flags, the same files, on the benchmarks' own writers.

Unlike the originals they refuse answers that are incomplete, duplicate, torn or unknown, name them, and write
nothing (exit status 1). `llava submit` does the same with one set of flags for all.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import Asked, Row, join, read_answers
from llava.eval.benchmarks import mmbench, seed, vizwiz, vqav2
from llava.eval.benchmarks.base import Sample
from llava.eval.score import as_table, report_problems


def vqav2_for_submission(argv: list[str] | None = None) -> int:
    """DIR/answers/SPLIT/CKPT/merge.jsonl to DIR/answers_upload/SPLIT/CKPT.json."""
    args = _parse(argv, ("--dir", "./playground/data/eval/vqav2"), ("--ckpt", None), ("--split", None))
    folder = Path(args.dir)
    listed = folder / vqav2.TEST
    asked = vqav2.questions_of(folder / f"{args.split}.jsonl", folder)
    return _convert(
        folder / "answers" / args.split / args.ckpt / "merge.jsonl",
        folder / "answers_upload" / args.split / f"{args.ckpt}.json",
        lambda out, answers: vqav2.write_upload(out, listed, answers),
        asked,
        vqav2.others_of(listed, asked),
    )


def vizwiz_for_submission(argv: list[str] | None = None) -> int:
    """Answers to the list the VizWiz server takes."""
    args = _parse(argv, ("--annotation-file", None), ("--result-file", None), ("--result-upload-file", None))
    questions = Path(args.annotation_file)
    return _convert(
        Path(args.result_file),
        Path(args.result_upload_file),
        lambda out, answers: vizwiz.write_upload(out, questions, answers),
        vizwiz.questions_of(questions, Path()),
    )


def mmbench_for_submission(argv: list[str] | None = None) -> int:
    """RESULT_DIR/EXPERIMENT.jsonl to UPLOAD_DIR/EXPERIMENT.xlsx."""
    args = _parse(
        argv,
        ("--annotation-file", None),
        ("--result-dir", None),
        ("--upload-dir", None),
        ("--experiment", None),
    )
    table = Path(args.annotation_file)
    return _convert(
        Path(args.result_dir) / f"{args.experiment}.jsonl",
        Path(args.upload_dir) / f"{args.experiment}.xlsx",
        lambda out, answers: mmbench.write_sheet(out, table, answers),
        mmbench.load(Path(), table),
    )


def seed_for_submission(argv: list[str] | None = None) -> int:
    """SEED-Bench answers to the leaderboard's file, and their accuracy."""
    args = _parse(argv, ("--annotation-file", None), ("--result-file", None), ("--result-upload-file", None))
    annotations = Path(args.annotation_file)
    samples = [
        Sample(number, "", None, number, str(annotations), reference=reference)
        for number, reference in seed.read_references(annotations).items()
    ]
    status = _convert(
        Path(args.result_file),
        Path(args.result_upload_file),
        lambda out, answers: seed.write(out, None, answers),
        samples,
    )
    if status == 0:
        benchmark = benchmarks.get("seed")
        joined, _ = benchmark.join(samples, read_answers([Path(args.result_file)])[0])
        print("\n".join(as_table(benchmark.score(samples, [row.text for row in joined])["metrics"])))
    return status


def gqa_for_eval(argv: list[str] | None = None) -> int:
    """Answers to the predictions file of the official GQA script."""
    args = _parse(argv, ("--src", None), ("--dst", None))
    return _convert(Path(args.src), Path(args.dst), _writer("gqa"))


def mmvet_for_eval(argv: list[str] | None = None) -> int:
    """Answers to the file the MM-Vet notebook grades."""
    args = _parse(argv, ("--src", None), ("--dst", None))
    return _convert(Path(args.src), Path(args.dst), _writer("mm-vet"))


def _writer(name: str) -> Callable[[Path, Mapping[str, str]], None]:
    return lambda out, answers: benchmarks.get(name).write(out, None, answers)


def _parse(argv: list[str] | None, *flags: tuple[str, str | None]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag, default in flags:
        parser.add_argument(flag, default=default, required=default is None)
    return parser.parse_args(argv)


def _convert(
    source: Path,
    out: Path,
    write: Callable[[Path, Mapping[str, str]], None],
    samples: Sequence[Sample] | None = None,
    others: Sequence[Asked] = (),
) -> int:
    """Answers of `source` to `out`. Without `samples` nobody knows what was asked: then only torn lines and
    duplicates are found."""
    rows, problems = read_answers([source])
    known = _asked_by(rows) if samples is None else samples
    joined, wrong = join([*(sample.asked for sample in known), *others], rows, lambda row: row.id)
    problems += wrong
    if problems:
        print(f"{out}: not written.", file=sys.stderr)
        report_problems(problems)
        return 1
    write(out, {str(s.id): row.text for s, row in zip([*known, *others], joined, strict=True) if row})
    print(f"{out}: {len(rows):,} answers")
    return 0


def _asked_by(rows: Sequence[Row]) -> list[Sample]:
    return [Sample(number, "", None, number, "") for number in dict.fromkeys(row.id for row in rows)]


def main(convert: Callable[[], int]) -> None:
    """A script's whole body."""
    try:
        sys.exit(convert())
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
