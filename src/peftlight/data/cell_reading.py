"""A text read as cells with a given separator and given quotes, and whether all of it fits."""

import csv
import io
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from peftlight.data.layout import Quoting
from peftlight.errors import listed

_LONGEST_CELL = 2**31 - 1


class CellRow(NamedTuple):
    """One row of cells."""

    line: int
    """The line on which it begins; a cell in quotes may span several."""
    cells: list[str]


@dataclass(frozen=True)
class CellReading:
    """A text as it is with one separator and one way of quoting."""

    text: str
    delimiter: str
    quoting: Quoting
    first_line: int = 1
    """The number of the text's first line in its file."""

    def quoted(self, quoting: Quoting) -> "CellReading":
        """The same text with other quotes."""
        return replace(self, quoting=quoting)

    @property
    def header(self) -> list[str]:
        """The names of the columns."""
        return self._read[0][0].cells if self._read[0] else []

    @property
    def body(self) -> list[CellRow]:
        """The rows after the header, blank lines left out; up to the first that breaks the rules of quoting."""
        return self._read[0][1:]

    @cached_property
    def surplus(self) -> str:
        """Which cell each row has beyond the header: the "last" if all are empty, the "first" if they count rows."""
        body = self.body
        if not body or any(len(row.cells) != len(self.header) + 1 for row in body):
            return ""
        if not any(row.cells[-1] for row in body):
            return "last"
        first = [row.cells[0] for row in body]
        return "first" if any(first == [str(at + start) for at in range(len(body))] for start in (0, 1)) else ""

    @cached_property
    def problem(self) -> tuple[int, str] | None:
        """The first line that does not fit the header, and what is wrong there."""
        width = len(self.header) + bool(self.surplus)
        for row in self.body:
            if len(row.cells) != width:
                return row.line, f"{len(row.cells)} cells where the header has {width} ({listed(self.header)})"
        return self._read[1]

    @property
    def fits(self) -> bool:
        """Whether there are several columns, and every row has a cell for each."""
        return self.problem is None and len(self.header) > 1

    @cached_property
    def share(self) -> float:
        """Which part of the rows has a cell for each of several columns."""
        if len(self.header) < 2 or not self.body:
            return 0.0
        return sum(len(row.cells) == len(self.header) for row in self.body) / len(self.body)

    @cached_property
    def _read(self) -> tuple[list[CellRow], tuple[int, str] | None]:
        rows: list[CellRow] = []
        reader = self._reader()
        while True:
            line = self.first_line + reader.line_num
            try:
                cells = next(reader, None)
            except csv.Error as error:
                return rows, (line, f"not valid CSV ({error})")
            if cells is None:
                return rows, None
            if cells:
                rows.append(CellRow(line, cells))

    def _reader(self) -> Any:
        csv.field_size_limit(_LONGEST_CELL)
        lines = io.StringIO(self.text, newline="")
        if self.quoting == "none":
            return csv.reader(lines, delimiter=self.delimiter, quoting=csv.QUOTE_NONE)
        how: dict[str, Any] = {"doublequote": False, "escapechar": "\\"} if self.quoting == "escaped" else {}
        return csv.reader(lines, delimiter=self.delimiter, strict=True, **how)
