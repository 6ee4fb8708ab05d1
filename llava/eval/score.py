"""`llava score BENCHMARK --root ROOT --answers FILE...`: the score of an answers file, or why there is none.

No torch, no network. Exit status 0: scored; 1: the answers are incomplete, duplicate, torn or unknown (all
named, no headline) unless --partial; 2: bad input, such as an annotation file that is not there.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval import benchmarks
from llava.eval.benchmarks.base import Benchmark
from llava.eval.provenance import mixed_runs

SHOWN_PROBLEMS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What `llava score` and `llava submit` share."""
    parser.add_argument("benchmark", metavar="BENCHMARK", help=", ".join(benchmarks.BENCHMARKS))
    parser.add_argument(
        "--root", type=Path, default=Path("playground/data/eval"), help="default: %(default)s"
    )
    parser.add_argument(
        "--answers",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="answers file(s): one, or all chunks",
    )
    parser.add_argument("--questions", type=Path, help="question file in place of the benchmark's own")
    parser.add_argument(
        "--partial", action="store_true", help="go on with what there is; of two answers the later counts"
    )


def run(args: argparse.Namespace) -> int:
    benchmark = benchmarks.get(args.benchmark)
    report = score(benchmark, args.root, args.answers, questions=args.questions, partial=args.partial)
    print(json.dumps(report) if args.json else as_text(benchmark, report))
    return 0 if report["headline"] else 1


def score(
    benchmark: Benchmark,
    root: Path,
    answers: Sequence[Path],
    *,
    questions: Path | None = None,
    partial: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """What `--json` prints. `headline` is None where the answers cannot be scored; `problems` says why.

    Args:
        questions: question file in place of the benchmark's own.
        partial: score what there is in spite of problems.
        limit: only the first so many questions were asked. Only they must be answered and are scored, and
            the report has `"partial": true`.

    Raises UserError for input that is missing or broken.
    """
    rows, problems = benchmark.read(answers)
    problems += mixed_runs(answers)
    notes = []
    if benchmark.from_rows and not questions and not (root / benchmark.files[0].path).exists():
        samples = benchmark.from_rows(rows)
        notes.append(
            f"{root / benchmark.files[0].path} is missing: nobody knows whether these are all questions"
        )
    else:
        samples = benchmark.load(root, questions)
    asked = samples[:limit]
    joined, wrong = benchmark.join(asked, rows, samples[len(asked) :])
    joined = joined[: len(asked)]
    problems += wrong
    answered = sum(row is not None for row in joined)
    report: dict[str, Any] = {
        "benchmark": benchmark.name,
        "version": benchmark.version,
        "headline": None,
        "metrics": {},
        "expected": len(asked),
        "answered": answered,
        "problems": problems,
        "notes": notes,
    }
    if len(asked) < len(samples):
        report["partial"] = True
        notes.append(f"partial: only the first {len(asked):,} of {len(samples):,} questions were asked")
    if len(samples) != benchmark.questions:
        notes.append(
            f"{len(samples):,} questions here, {benchmark.questions:,} in the published set: another set"
        )
    if problems and not partial:
        return report
    result = benchmark.score(asked, [row.text if row else None for row in joined])
    report["metrics"] = result["metrics"]
    value = result["metrics"][benchmark.headline]
    if value is None:
        problems.append(f"{benchmark.headline} is a mean over no answered question")
    else:
        report["headline"] = {
            "name": benchmark.headline,
            "value": value,
            "interval": result["interval"],
            "over": answered,
        }
    return report


def as_text(benchmark: Benchmark, report: dict[str, Any]) -> str:
    """The report for people: headline as papers print it, its parts, what is wrong."""
    lines = []
    headline = report["headline"]
    if headline:
        over = f"{headline['over']:,}" + (f" of {report['expected']:,}" if report["problems"] else "")
        low_high = headline["interval"]
        interval = f" (95 % interval {low_high[0]:.1f} to {low_high[1]:.1f})" if low_high else ""
        lines.append(
            f"{benchmark.title}: {headline['name']} {headline['value']:.1f}{benchmark.unit}{interval} "
            f"over {over} questions"
        )
        lines += as_table(report["metrics"])
    else:
        lines.append(
            f"{benchmark.title}: no score. {report['answered']:,} of {report['expected']:,} questions "
            "have an answer, and this is wrong (--partial scores what there is):"
        )
    lines += problem_lines(report["problems"])
    lines += [f"  note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def as_table(metrics: dict[str, Any], indent: str = "  ") -> list[str]:
    lines = []
    for name, value in metrics.items():
        if not isinstance(value, dict):
            lines.append(f"{indent}{name}: {_number(value)}")
        elif all(not isinstance(inner, dict) for inner in value.values()) and indent != "  ":
            lines.append(f"{indent}{name}: " + ", ".join(f"{key} {_number(x)}" for key, x in value.items()))
        else:
            lines += [f"{indent}{name}:", *as_table(value, indent + "  ")]
    return lines


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{4 if abs(value) < 1 else 2}f}".rstrip("0").rstrip(".")


def problem_lines(problems: Sequence[str]) -> list[str]:
    """The first ones and the number of the others."""
    more = len(problems) - SHOWN_PROBLEMS
    lines = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    return [*lines, f"  ... and {more:,} more"] if more > 0 else lines


def report_problems(problems: Sequence[str]) -> None:
    for line in problem_lines(problems):
        print(line, file=sys.stderr)
