"""Training data as a table on disk: read into Arrow once, memory-mapped by every process afterwards.

The file may be LLaVA's JSON list, JSON lines, or parquet. Rows differ in the wild (ids of any type, `image`
absent, null, a name or a list of names), so they are brought to one schema while being copied, a piece at a
time: a file of a gigabyte never lies in memory, and eight processes on a machine share one copy in the page
cache. The copy is kept under a name made of the file's path, size and time: a changed file is read again.
"""

import codecs
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from llava.errors import UserError, first_line
from llava.files import replacing_file

if TYPE_CHECKING:
    from datasets import Dataset

FORMAT = 4  # goes into the copy's name: raise it when the columns change


class Turn(msgspec.Struct):
    value: str
    speaker: str = msgspec.field(name="from")


class Sample(msgspec.Struct):
    """A row as the file has it; other fields are left aside."""

    conversations: Annotated[list[Turn], msgspec.Meta(min_length=1)]
    id: Any = ""
    image: str | list[Annotated[str, msgspec.Meta(min_length=1)]] | None = None


def table_row(raw: Any) -> dict[str, Any]:
    """A row of the file as the table has it.

    Returns:
        words: over all turns, separated by whitespace, at least 1; negative for a sample without an image.
        id, image (a list of file names), conversations ({"from", "value"} each).
        problem: None, or why the row is no sample; image and conversations are then empty.
    """
    try:
        sample = msgspec.convert(raw, Sample)
    except msgspec.ValidationError as error:
        fields = raw if isinstance(raw, dict) else {}
        kind = {"words": 1 if fields.get("image") else -1, "id": str(fields.get("id", ""))}
        return {**kind, "image": [], "conversations": [], "problem": str(error)}
    images = [sample.image] if isinstance(sample.image, str) and sample.image else sample.image or []
    words = max(sum(len(turn.value.split()) for turn in sample.conversations), 1)
    return {
        "words": words if images else -words,
        "id": str(sample.id),
        "image": images,
        "conversations": [{"from": turn.speaker, "value": turn.value} for turn in sample.conversations],
        "problem": None,
    }


def read_rows(path: Path) -> Iterator[Any]:
    """The rows of a JSON list, JSON lines or parquet file as Python objects, a piece of the file at a time.

    Raises:
        UserError: the file is none of the three or breaks off.
    """
    import ijson
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = 0
    with path.open("rb") as file:
        start = file.read(64)
        try:
            if start.startswith(b"PAR1"):
                for batch in pq.ParquetFile(path).iter_batches(batch_size=2_000):
                    yield from batch.to_pylist()
                return
            file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
            in_list = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            prefix, lines = ("item", False) if in_list else ("", True)
            for row in ijson.items(file, prefix, multiple_values=lines, use_float=True):
                yield row
                count += 1
        except (ijson.JSONError, UnicodeDecodeError) as error:
            reason = first_line(error)
            raise UserError(
                f"{path} is not valid JSON after row {count} ({reason}); copy it again."
            ) from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} is a damaged parquet file ({first_line(error)}); copy it again."
            ) from None


def open_table(path: str | Path) -> "Dataset":
    """The file as a memory-mapped `datasets.Dataset` with the columns of `table_row`.

    The first call copies the file (a progress bar on stderr shows it) to $LLAVA_CACHE/data or
    ~/.cache/llava/data; others, also from other processes, open the copy, which appears by a rename.
    """
    try:
        from datasets import Dataset
    except ImportError:
        raise UserError("training data needs the `datasets` package: pip install 'llava[train]'.") from None

    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no data file {path}; it is one JSON, JSONL or parquet file.")
    state = path.stat()
    key = f"{FORMAT} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    cache = Path(os.environ.get("LLAVA_CACHE") or Path.home() / ".cache" / "llava")
    copy = cache / "data" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.arrow"
    try:
        if not copy.is_file():
            with replacing_file(copy) as partial:
                _write_copy(path, partial)
        return Dataset.from_file(str(copy))
    except OSError as error:
        raise UserError(f"the copy of {path} cannot be written ({error}); set LLAVA_CACHE.") from error


def _write_copy(path: Path, copy: Path) -> None:
    import pyarrow as pa
    from tqdm import tqdm

    text = pa.string()
    # Every run reads all of `words` when it begins: first in the schema it lies beside the batch's header,
    # which has to be read in any case, and no other page of the file is touched.
    schema = pa.schema(
        {
            "words": pa.int32(),
            "id": text,
            "image": pa.list_(text),
            "conversations": pa.list_(pa.struct({"from": text, "value": text})),
            "problem": text,
        }
    )
    rows = map(table_row, tqdm(read_rows(path), f"copying {path.name}", unit=" rows", delay=1))
    with pa.ipc.new_stream(str(copy), schema) as writer:
        while batch := list(itertools.islice(rows, 2_000)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema))
    if not writer.stats.num_record_batches:
        raise UserError(f"{path} has no rows.")


def image_names(table: "Dataset") -> Iterator[list[str]]:
    """The `image` column, row by row; for all rows far quicker than the rows themselves."""
    return (names for batch in table.select_columns("image").iter(1_000) for names in batch["image"])
