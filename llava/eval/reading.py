"""Reads the files benchmarks ship, each through a schema, so that a file of another shape is one sentence.

A schema is any type msgspec knows: a `msgspec.Struct` for objects with known keys (others are ignored),
`dict[str, X]`, `list[X]`. What does not fit becomes a UserError that names the file, the line where there
are lines, and the place inside it, such as `$.annotations[7].answers`.
"""

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from llava.errors import UserError, first_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UNREADABLE = (OSError, UnicodeDecodeError, RecursionError, csv.Error, msgspec.DecodeError)


class MissingFile(UserError):
    """A file of a benchmark is not there."""


def require(path: Path) -> Path:
    if not path.exists():
        raise MissingFile(
            f"{path} is missing; `llava doctor eval` says what belongs there and where it comes from."
        )
    return path


def read_json(path: Path, schema: Any = Any) -> Any:
    """The content of a JSON file as `schema`."""
    try:
        return msgspec.json.decode(require(path).read_bytes().removeprefix(BYTE_ORDER_MARK), type=schema)
    except UNREADABLE as error:
        raise _refusal(path, error) from error


def read_rows(path: Path, schema: Any) -> Iterator[tuple[str, Any]]:
    """(file:line, the line as `schema`) of a JSON Lines file, blank lines left out."""
    decode, where = msgspec.json.Decoder(schema).decode, str(path)
    try:
        with open(require(path), "rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{path}:{number}"
                if number == 1:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield where, decode(line)
    except UNREADABLE as error:
        raise _refusal(where, error) from error


def read_table(path: Path, schema: Any) -> Iterator[tuple[dict[str, str], Any]]:
    """(cells by column, the same as `schema`) of a tab-separated file with a header.

    Cells are text: an empty one is "", and `None`, `NA` or `1` are what they say.
    """
    csv.field_size_limit(1 << 30)  # pictures are cells
    where = str(path)
    try:
        with open(require(path), encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter="\t")
            for row in table:
                where = f"{path}:{table.line_num}"
                # A row with too few cells has None for text, one with too many has None for a column.
                cells = msgspec.convert(row, dict[str, str])
                yield cells, msgspec.convert(cells, schema, strict=False)
    except UNREADABLE as error:
        raise _refusal(where, error) from error


def _refusal(where: Path | str, error: BaseException) -> UserError:
    return UserError(f"{where}: {first_line(error)}; this is not the file that belongs here, fetch it again.")


def jsonl(rows: Iterable[Any]) -> str:
    """Dicts or structs, one a line."""
    return "".join(json.dumps(msgspec.to_builtins(row)) + "\n" for row in rows)
