"""The sheet the MMBench server takes: `index question A B C D prediction answer split`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from llava.errors import UserError
from llava.files import replacing_file

DROPPED = frozenset(("index", "hint", "category", "source", "image", "comment", "l2-category"))
PREDICTION_COLUMN = 6


def write_sheet(out: Path, table: Iterable[tuple[dict[str, str], Any]], answers: Mapping[str, str]) -> None:
    """An xlsx of the rows of an MMBench table, whole or not at all; "" is a blank cell."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise UserError(
            "The MMBench server takes an xlsx: `pip install 'llava[eval]'` brings openpyxl."
        ) from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def text(value: str) -> object:
        cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        cell.data_type = "s"  # an answer that starts with = is no formula
        return cell if value else None

    for number, (cells, row) in enumerate(table):
        columns = [name for name in cells if name not in DROPPED]
        if number == 0:
            header = ["index", *columns]
            header.insert(PREDICTION_COLUMN, "prediction")
            sheet.append([text(name) for name in header])
        line = [row.index, *(text(cells[name]) for name in columns)]
        line.insert(PREDICTION_COLUMN, text(answers.get(str(row.index), "")))
        sheet.append(line)
    with replacing_file(out) as partial:
        book.save(partial)
