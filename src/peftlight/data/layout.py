"""What a user says of the separator and the quotes of a file of cells."""

from dataclasses import dataclass
from typing import Literal

from peftlight.errors import UserError

Quoting = Literal["minimal", "escaped", "none"]
"""Cells may stand in double quotes, with a quote inside doubled (minimal) or after a backslash (escaped); or a quote is
text like any other (none)."""

_WORDS = {"tab": "\t", "\\t": "\t"}


@dataclass(frozen=True)
class Layout:
    """The separator and the quotes of csv and tsv files; what is None is found in each file."""

    delimiter: str | None = None
    quoting: Quoting | None = None

    @property
    def is_given(self) -> bool:
        """Whether anything is said."""
        return self.delimiter is not None or self.quoting is not None


FOUND = Layout()
"""Everything is found in the file."""


def layout_of(delimiter: str | None, quoting: Quoting | None) -> Layout:
    """The layout with a separator as it is written in a configuration, where a tab is hard to write.

    Raises:
        UserError: the separator is not one character, or one that ends lines or quotes cells.
    """
    sign = delimiter if delimiter is None else _WORDS.get(delimiter, delimiter)
    if sign is not None and (len(sign) != 1 or sign in '"\r\n'):
        raise UserError(f"delimiter is one character, or the word tab; it is {delimiter!r}.")
    return Layout(sign, quoting)
