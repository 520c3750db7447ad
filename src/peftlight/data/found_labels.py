"""The labels that stand in the rows of a training split: how often each, and where first."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from peftlight.data.table import Table
from peftlight.errors import listed

Label = int | str

_NUMBER = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?")
_MOST_NAMED = 30
_MOST_LETTERS = 500
MANY_ROWS = 50
"""From so many rows on, one row alone is remarkable."""


def number_of(label: Label) -> float | None:
    """The number that a label is, or is written as; None where it is a name."""
    if isinstance(label, int):
        return float(label)
    return float(label.replace(",", ".")) if _NUMBER.fullmatch(label) else None


@dataclass(frozen=True)
class FoundLabels:
    """All labels of a split."""

    tables: Sequence[Table]
    labels: Sequence[Sequence[Label]]
    """Of each table the label of every row."""
    column: str
    """Where they stand."""

    @cached_property
    def counts(self) -> Counter[Label]:
        """In how many rows each stands."""
        return Counter(label for part in self.labels for label in part)

    @cached_property
    def rows(self) -> int:
        """How many rows there are."""
        return sum(map(len, self.labels))

    @cached_property
    def are_numbers(self) -> bool:
        """Whether every label is an integer."""
        return all(isinstance(label, int) for label in self.counts)

    @cached_property
    def numbers(self) -> list[int]:
        """The integers among them in order."""
        return sorted(label for label in self.counts if isinstance(label, int))

    @cached_property
    def in_order(self) -> list[Label]:
        """The labels in order: numbers by their size, before names by the alphabet."""
        return sorted(self.counts, key=_place)

    @cached_property
    def names(self) -> list[str]:
        """What the labels are called as classes, in order."""
        return [str(label) for label in self.in_order]

    @property
    def rare(self) -> list[Label]:
        """Those of one row."""
        return [label for label, count in self.counts.items() if count == 1]

    def where(self, label: Label) -> str:
        """The first row that has it, as an error message begins."""
        for table, part in zip(self.tables, self.labels, strict=True):
            if label in part:
                return table.where(part.index(label))
        raise KeyError(label)

    @property
    def sizes(self) -> list[int]:
        """How many rows each label has, in order."""
        return [self.counts[label] for label in self.in_order]

    def told(self) -> str:
        """Each label with its count."""
        return listed(f"{name} ({count:,})" for name, count in zip(self.names, self.sizes, strict=True))

    def option(self) -> str:
        """The line of a configuration that makes all of them classes."""
        shown = [repr(name) for name in self.names[:_MOST_NAMED]]
        while len(", ".join(shown)) > _MOST_LETTERS and len(shown) > 1:
            shown.pop()
        rest = len(self.names) - len(shown)
        return f"labels: [{', '.join(shown)}{f', ... and {rest} more' if rest else ''}]"


def _place(label: Label) -> tuple[bool, float, str]:
    number = number_of(label)
    return number is None, number or 0.0, str(label)
