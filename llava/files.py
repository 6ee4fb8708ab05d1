"""Files that appear whole or not at all, and JSON that is read with one sentence for what is wrong with it.

A file is written beside its target under a hidden name and renamed at the end, so a killed process leaves the
old file or the new one and never half of either.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llava.errors import UserError


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; renamed to `path` at the end, deleted if the block raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """A UTF-8 file with these characters, line ends unchanged."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def write_json(path: str | Path, content: Any) -> None:
    """An indented JSON file; what JSON has no type for (paths, dtypes) is written as its `str`."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: not there, not readable, not UTF-8 or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # also a UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON ({error}): download or copy it again") from error
