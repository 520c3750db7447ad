"""Files of cells with a separator between them: the separator and the quotes are found in the file, and said."""

import dataclasses
import re
from collections.abc import Iterable

from peftlight.data.cell_reading import CellReading
from peftlight.data.layout import Layout, Quoting
from peftlight.data.table import Table
from peftlight.data.written_quotes import is_csv_written
from peftlight.errors import UserError, listed

_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
_EXCELS_LINE = re.compile(r"sep=(.)\r?\n", re.IGNORECASE)
_BARE_QUOTE = re.compile(r'(?<!\\)"')
_MOST = 0.5
"""The share of rows that must fit a separator for it to be that of a file with a mistake in it."""


def delimited_table(name: str, text: str, usual: str, layout: Layout) -> Table:
    """The rows of a file; its separator and quotes, where they are not given, fit all of it.

    Args:
        name: what messages call the file.
        text: its content.
        usual: the separator that files with its ending have most often.
        layout: what the user says.

    Raises:
        UserError: a row does not fit the header, or a column has no name.
    """
    first_line, told = 1, _EXCELS_LINE.match(text)
    if told and layout.delimiter in (None, told[1]):
        text, first_line, layout = text[told.end() :], 2, dataclasses.replace(layout, delimiter=told[1])
    delimiters = [layout.delimiter] if layout.delimiter else _possible(text, usual)
    readings = (_with_quotes(CellReading(text, each, "minimal", first_line), layout.quoting) for each in delimiters)
    reading = _best(readings)
    if reading.problem is not None:
        raise UserError(_refusal(name, reading))
    found = _findings(reading, usual, layout)
    return _table(name, reading, [f"{name}: {'; '.join(found)}."] if found else [])


def _possible(text: str, usual: str) -> list[str]:
    """The separators that the header may have, the usual one first."""
    header = text.lstrip("\r\n").split("\n", 1)[0]
    return [usual, *(each for each in _SEPARATORS if each != usual and each in header)]


def _best(readings: Iterable[CellReading]) -> CellReading:
    """The first that fits the whole text or, where none does, most of it."""
    seen: list[CellReading] = []
    for reading in readings:
        if reading.fits:
            return reading
        seen.append(reading)
    nearest = max(seen, key=lambda each: each.share)
    return nearest if nearest.share >= _MOST else seen[0]


def _with_quotes(reading: CellReading, given: Quoting | None) -> CellReading:
    """The reading with the quotes that are given or, where none are, those that the file has."""
    if given is not None:
        return reading.quoted(given)
    if reading.delimiter == "\t" and not ('"' in reading.text and is_csv_written(reading)):
        return reading.quoted("none")
    escaped = reading.quoted("escaped")
    has_escapes = '\\"' in reading.text and (reading.problem is not None or _all_after_backslashes(reading))
    return escaped if has_escapes and escaped.problem is None else reading


def _all_after_backslashes(reading: CellReading) -> bool:
    """Whether no quote is left in a cell without a backslash before it."""
    return not any(_BARE_QUOTE.search(cell) for row in reading.body for cell in row.cells)


def _findings(reading: CellReading, usual: str, layout: Layout) -> list[str]:
    """What was found where nobody expects it."""
    found: list[str] = []
    if layout.delimiter is None and reading.delimiter != usual:
        found.append(f"its cells are separated by {_SEPARATORS[reading.delimiter]}s (data.delimiter)")
    if layout.quoting is None and reading.quoting == "escaped":
        found.append("a backslash stands before quotes in its cells, and is taken away (data.quoting: escaped)")
    if layout.quoting is None and reading.delimiter == "\t" and '"' in reading.text:
        if reading.quoting == "minimal":
            found.append("its quotes are those of a csv writer, and no part of the text (data.quoting: minimal)")
        elif whole := _whole_in_quotes(reading):
            found.append(f"quotes are part of the text, also those around {whole:,} whole cells (data.quoting: none)")
    return found


def _whole_in_quotes(reading: CellReading) -> int:
    cells = (cell for row in reading.body for cell in row.cells)
    return sum(len(cell) > 1 and cell[0] == cell[-1] == '"' for cell in cells)


def _refusal(name: str, reading: CellReading) -> str:
    assert reading.problem is not None
    line, problem = reading.problem
    separator = _SEPARATORS.get(reading.delimiter, repr(reading.delimiter))
    if reading.quoting == "none":
        advice = f"A cell cannot hold a {separator} or a line break"
        advice += ", unless it stands in double quotes: --data.quoting minimal" if '"' in reading.text else ""
    elif reading.quoted("none").fits:
        advice = "Close the quotes; or if quotes are text there and stand around no cell: --data.quoting none"
    else:
        advice = f"Put a cell with a {separator} in double quotes, and double each quote in it"
    return f"{name}, line {line}: {problem}. {advice}."


def _table(name: str, reading: CellReading, notices: list[str]) -> Table:
    header = [""] * (reading.surplus == "first") + reading.header + [""] * (reading.surplus == "last")
    body = reading.body
    nameless = [at for at, column in enumerate(header) if not column.strip()]
    empty = [at for at in nameless if body and not any(row.cells[at] for row in body)]
    kept = [at for at in range(len(header)) if at not in empty]
    if empty and kept:
        notices.append(f"{name}: columns without a name and without content are left out ({len(empty)}).")
    if len(kept) > 1 and kept[0] in nameless:
        del kept[0]
        notices.append(f"{name}: the first column has no name and is left out, as the row numbers of pandas.")
    names = [header[at] for at in kept]
    if len(set(names)) < len(names) or not names or any(not column.strip() for column in names):
        raise UserError(f"{name}, line 1: the header needs one name per column, each once; found {listed(header)}.")

    def cells(column: str) -> list[object]:
        at = kept[names.index(column)]
        return [row.cells[at] for row in body]

    return Table(name, "line", names, [row.line for row in body], cells, notices=tuple(notices))
