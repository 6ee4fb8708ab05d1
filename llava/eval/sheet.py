"""Spreadsheets for servers that take no plain file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from llava.errors import UserError
from llava.files import replacing_file


def write_sheet(out: Path, rows: Iterable[Sequence[int | str]]) -> None:
    """An xlsx with one sheet, whole or not at all; text stays text, "" is a blank cell."""
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError as error:
        raise UserError("This server takes an xlsx: `pip install 'llava[eval]'` brings openpyxl.") from error
    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")

    def cell(value: int | str) -> object:
        if isinstance(value, int) or not value:
            return value or None
        text = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value))
        text.data_type = "s"  # an answer that starts with = is no formula
        return text

    for row in rows:
        sheet.append([cell(value) for value in row])
    with replacing_file(out) as partial:
        book.save(partial)
