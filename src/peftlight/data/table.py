"""Rows of one file as columns, each row knowing where it stands in that file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

MISSING = object()
"""The cell of a row that has no such key, which only JSON allows."""


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of one file or one hub split."""

    name: str
    """The file as the user wrote it, or the hub's dataset and split."""
    unit: str
    """What `numbers` count: "line" in formats made of lines, "row" in the others."""
    columns: list[str]
    """The names of the columns in their order."""
    numbers: Sequence[int]
    """The 1-based number of each row in its file."""
    cells: Callable[[str], Sequence[object]]
    """All cells of one column."""
    class_names: Mapping[str, list[str]] = field(default_factory=dict)
    """The names behind the numbers of a column, in order, where the table itself says them."""
    notices: tuple[str, ...] = ()
    """What was found in reading it that the user has to know."""

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        """File and number of the row, as an error message begins."""
        return f"{self.name}, {self.unit} {self.numbers[index]}"
