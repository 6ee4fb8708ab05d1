"""Plain text tables for the terminal."""

from collections.abc import Container, Sequence


def render(header: Sequence[str], rows: Sequence[Sequence[str]], left: Container[int] = (0,)) -> str:
    """A table with a rule under its header; columns are as wide as their widest cell.

    Args:
        left: columns aligned to the left; the others are numbers, aligned to the right.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join((line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)))
