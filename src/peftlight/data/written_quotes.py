"""Whether the quotes in a tab-separated file are a csv writer's, or text like any other as in SST-2's files."""

import re
from typing import NamedTuple

from peftlight.data.cell_reading import CellReading


class _Written(NamedTuple):
    """A cell as it is written."""

    text: str
    is_quoted: bool


def is_csv_written(reading: CellReading) -> bool:
    """Whether a csv writer put cells in quotes.

    It leaves no quote outside of quoted cells, and quotes what needs it (a cell with a quote, a tab or a line break;
    Excel also every cell with a comma) or a whole column. A text in quotes for another reason has them of its own.
    """
    cells = _as_written(reading.text, reading.delimiter)
    if cells is None or reading.problem is not None:
        return False
    if any(quoted and re.search(rf'""|[\r\n{re.escape(reading.delimiter)}]', text) for text, quoted in cells):
        return True
    width = len(reading.header)
    columns = [cells[width + at :: width] for at in range(width)]
    if len(reading.body) > 1 and all(_all_or_none(column) for column in columns):
        return True
    return all(("," in text) == quoted for column in columns for text, quoted in column)


def _all_or_none(column: list[_Written]) -> bool:
    return len({cell.is_quoted for cell in column}) < 2


def _as_written(text: str, delimiter: str) -> list[_Written] | None:
    """All cells; None where a quote stands in or behind a cell that it does not begin and end."""
    mark = re.escape(delimiter)
    cell = re.compile(rf'(?:"((?:[^"]|"")*+)"|([^"{mark}\r\n]*+))({mark}|\r\n|\r|\n|\Z)')
    cells: list[_Written] = []
    at = 0
    while at < len(text):
        found = cell.match(text, at)
        if found is None:
            return None
        is_blank_line = not found[0].strip("\r\n") and (at == 0 or text[at - 1] in "\r\n")
        if not is_blank_line:
            cells.append(_Written(found[2], False) if found[1] is None else _Written(found[1], True))
        at = found.end()
    return cells
