"""Training data as a table on disk: read into Arrow once, memory-mapped by every process afterwards.

The file may be LLaVA's JSON list, JSON lines, or parquet. Rows differ in the wild (ids of any type, `image`
absent, null, a name or a list of names), so they are brought to one schema while being copied, a piece at a
time: a file of a gigabyte never lies in memory, and eight processes on a machine share one copy in the page
cache. The copy is kept under a name made of the file's path, size and time: a changed file is read again.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.errors import UserError, first_line

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = 2  # goes into the copy's name: raise it when the schema below changes
_ROWS_AT_ONCE = 2_000
_READ_AT_ONCE = 4 << 20  # characters
_MAX_ROW = 64 << 20  # characters; a row that is still not complete then is taken for broken JSON


@dataclass(frozen=True)
class Row:
    """One sample of the table. `problem` says in words why it cannot be used; the rest is then empty."""

    id: str
    image: list[str]
    conversations: list[dict[str, str]]
    words: int
    """Words over all turns, separated by whitespace, at least 1; negative for a sample without an image."""
    problem: str | None


def normalise(raw: Any) -> Row:
    """A row of the file as our schema has it."""
    if not isinstance(raw, dict):
        return Row("", [], [], -1, f"it is not an object but a {type(raw).__name__}")
    identity = str(raw.get("id", ""))
    try:
        images = _images(raw.get("image"))
        turns = _turns(raw.get("conversations"))
    except ValueError as error:
        return Row(_encodable(identity), [], [], 1 if raw.get("image") else -1, str(error))
    words = max(sum(len(turn["value"].split()) for turn in turns), 1)
    return Row(_encodable(identity), images, turns, words if images else -words, None)


def _images(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("`image` is neither a file name nor a list of file names")
    return [_text(name) for name in names]


def _turns(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise ValueError("it has no list of `conversations`")
    turns = []
    for i, turn in enumerate(value, 1):
        who, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if not isinstance(who, str) or not isinstance(text, str):
            raise ValueError(f"turn {i} is not an object with the strings `from` and `value`")
        turns.append({"from": _text(who), "value": _text(text)})
    return turns


def _text(text: str) -> str:
    if not text.isascii() and _encodable(text) != text:
        raise ValueError("it holds half a surrogate pair, which is no character")
    return text


def _encodable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


# ----------------------------------------------------------------------------------------------- reading


def read_rows(path: Path, progress: Any = None) -> Iterator[Any]:
    """The rows of a JSON list, JSON lines or parquet file as Python objects, a piece of the file at a time.

    `progress` is a tqdm over the file's bytes. Raises UserError where the file is none of the three or breaks
    off, naming the row.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1":
        yield from _parquet_rows(path, progress)
    else:
        yield from _json_rows(path, progress)


def _parquet_rows(path: Path, progress: Any) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            size = path.stat().st_size
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                yield from batch.to_pylist()
                if progress is not None:
                    progress.update(size * batch.num_rows // file.metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} is a damaged parquet file ({first_line(error)}); copy it again.") from None


def _json_rows(path: Path, progress: Any) -> Iterator[Any]:
    """One scanner for both JSON forms: objects one after the other, with commas in a list."""
    decoder = json.JSONDecoder()
    text, at, row = "", 0, 0
    in_list = started = False
    with path.open(encoding="utf-8-sig") as file:

        def more() -> bool:
            nonlocal text, at
            try:
                piece = file.read(_READ_AT_ONCE)
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error.reason}, after row {row}).") from None
            text, at = text[at:] + piece, 0
            if progress is not None:
                progress.update(file.buffer.tell() - progress.n)
            return bool(piece)

        while True:
            while at < len(text) and (text[at].isspace() or (started and text[at] == ",")):
                at += 1
            if at == len(text):
                if more():
                    continue
                if in_list or not started:
                    raise UserError(f"{path} ends in the middle of its list, after row {row}; copy it again.")
                return
            if not started:
                started = True
                in_list = text[at] == "["
                at += in_list
                continue
            if in_list and text[at] == "]":
                return
            try:
                value, at = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                # The object may go on in the next piece; read on unless it is broken well before the end.
                if len(text) - at < _MAX_ROW and _may_go_on(error, text) and more():
                    continue
                raise UserError(f"{path} is not valid JSON in row {row} ({error.msg}).") from None
            yield value
            row += 1


def _may_go_on(error: json.JSONDecodeError, text: str) -> bool:
    return error.msg.startswith("Unterminated string") or len(text) - error.pos < 16


# ------------------------------------------------------------------------------------------ copy on disk


def cache_directory() -> Path:
    """Where copies lie: $LLAVA_CACHE, else `llava` in the user's cache directory."""
    if own := os.environ.get("LLAVA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llava"


def open_table(path: str | Path, cache_dir: str | Path | None = None) -> "Dataset":
    """The file as a memory-mapped `datasets.Dataset` with the columns of `Row`.

    The first call copies the file (a progress bar on stderr shows it) to `cache_dir` (default
    `cache_directory()/data`); others, also from other processes, open the copy. Of processes that begin
    together one copies and the others wait.
    """
    try:
        from datasets import Dataset
    except ImportError:
        raise UserError("training data needs the `datasets` package: pip install 'llava[train]'.") from None
    from filelock import FileLock

    path = Path(path)
    try:
        state = path.stat()
    except OSError:
        raise UserError(f"there is no data file {path}; check the path.") from None
    if path.is_dir():
        raise UserError(f"{path} is a directory; training data is one JSON, JSONL or parquet file.")
    key = f"{_FORMAT} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    name = f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    directory = Path(cache_dir) if cache_dir else cache_directory() / "data"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{directory} cannot be made for the copy of the data ({error.strerror}); set LLAVA_CACHE."
        ) from None
    copy = directory / name
    if not copy.is_file():
        with FileLock(f"{copy}.lock"):
            if not copy.is_file():
                _write_copy(path, copy)
    return Dataset.from_file(str(copy))


def mapped_anew(table: "Dataset") -> "Dataset":
    """The same table, with none of its pages in this process's memory (the page cache keeps them)."""
    from datasets import Dataset

    return Dataset.from_file(table.cache_files[0]["filename"])


def image_names(table: "Dataset") -> Iterator[list[str]]:
    """The `image` column, row by row; for all rows far quicker than the rows themselves."""
    return (names for batch in table.select_columns("image").iter(1_000) for names in batch["image"])


def _write_copy(path: Path, copy: Path) -> None:
    import pyarrow as pa
    from tqdm import tqdm

    string_list = pa.list_(pa.string())
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    # Every run reads all of `words` when it begins: first in the schema it lies beside the batch's header,
    # which has to be read in any case, and no other page of the file is touched.
    schema = pa.schema(
        [
            ("words", pa.int32()),
            ("id", pa.string()),
            ("image", string_list),
            ("conversations", pa.list_(turn)),
            ("problem", pa.string()),
        ]
    )
    unfinished = copy.with_name(f"{copy.name}.{os.getpid()}.tmp")
    try:
        with (
            tqdm(
                total=path.stat().st_size, unit="B", unit_scale=True, desc=f"reading {path.name}", delay=1
            ) as bar,
            pa.OSFile(str(unfinished), "wb") as sink,
            pa.ipc.new_stream(sink, schema) as writer,
        ):
            batch: list[dict[str, Any]] = []
            count = 0
            for raw in read_rows(path, bar):
                batch.append(vars(normalise(raw)))
                count += 1
                if len(batch) == _ROWS_AT_ONCE:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                    batch = []
            if batch:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        if count == 0:
            raise UserError(f"{path} has no rows.")
        os.replace(unfinished, copy)
    finally:
        unfinished.unlink(missing_ok=True)
