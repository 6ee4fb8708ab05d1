"""`llava doctor eval [BENCHMARK ...]`: which files are missing, where they belong, how many rows they must
have and where they come from. `--rebuild` makes those that other files determine.

Exit status 0: everything is there; 1: something is missing or has another number of rows than the official
release.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.eval import benchmarks
from llava.eval.answers import numbered_lines
from llava.eval.benchmarks.base import Benchmark, DataFile
from llava.eval.reading import read_json, read_table
from llava.files import write_text

NO_PICTURE = (".txt", ".json", ".zip")


Finding = tuple[DataFile, int | None, str]
"""(file, its number of rows, None where it is missing; what is wrong with it, "" where nothing is)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help="default: all")
    parser.add_argument(
        "--root", type=Path, default=Path("playground/data/eval"), help="default: %(default)s"
    )
    parser.add_argument("--rebuild", action="store_true", help="make the files that other files determine")


def run(args: argparse.Namespace) -> int:
    healthy = True
    for benchmark in map(benchmarks.get, args.benchmarks or benchmarks.BENCHMARKS):
        if args.rebuild:
            rebuild(benchmark, args.root)
        findings = [examine(file, args.root) for file in benchmark.files]
        healthy &= not any(trouble for _, _, trouble in findings)
        print("\n".join(as_lines(benchmark, findings)))
    return 0 if healthy else 1


def examine(file: DataFile, root: Path) -> Finding:
    path = root / file.path
    if not path.exists():
        return file, None, "missing" + ("; `--rebuild` makes it" if file.rebuild else "")
    try:
        rows = count_rows(path)
    except UserError as error:
        return file, 0, str(error)
    if file.rows is not None and rows != file.rows:
        return file, rows, f"{rows:,} rows instead of {file.rows:,}: not the official set"
    return file, rows, ""


def count_rows(path: Path) -> int:
    """Questions of a question file, entries of an annotation file, pictures of a folder."""
    if path.is_dir():
        return sum(not name.endswith(NO_PICTURE) for _, _, names in os.walk(path) for name in names)
    if path.suffix == ".tsv":
        return sum(1 for _ in read_table(path, Any))
    lines = sum(1 for _ in numbered_lines(path))
    if path.suffix != ".json" or path.name.startswith("coco_pope"):  # POPE's labels are JSON Lines
        return lines
    table = read_json(path, dict[str, Any] | list[Any])
    for key in ("data", "questions", "test"):
        if key in table and isinstance(table, dict) and isinstance(table[key], list):
            return len(table[key])
    return len(table)


def rebuild(benchmark: Benchmark, root: Path) -> None:
    """Write the files that are missing and can be made; say which."""
    for file in benchmark.files:
        path = root / file.path
        if file.rebuild is None or path.exists():
            continue
        try:
            write_text(path, file.rebuild(root))
            print(f"{benchmark.name}: {path} made")
        except UserError as error:
            print(f"{benchmark.name}: {path} cannot be made: {error}")


def as_lines(benchmark: Benchmark, findings: list[Finding]) -> list[str]:
    lines = [f"{benchmark.name}  ({benchmark.title}, {benchmark.questions:,} questions)"]
    for file, rows, trouble in findings:
        lines.append(f"  {'!!' if trouble else 'ok'} {file.path}  {trouble or f'{rows:,} rows'}")
        if rows is None:
            expected = f"{file.rows:,} rows; " if file.rows is not None else ""
            lines.append(f"       {expected}needed to {file.purpose}; from {file.source}")
    return lines
