"""CoNLL's text format: a word and its tag on each line, and a blank line after each sentence."""

import re

from peftlight.data.table import Table
from peftlight.errors import UserError

_DOCUMENT = "-DOCSTART-"
_FORMAT = "Each line is a word and its tag with a tab or a space between, and a blank line ends a sentence"


def conll_table(name: str, text: str) -> Table:
    """The sentences of a file as rows of tokens and tags, each numbered by its first line.

    A line's first cell is the word and its last the tag; what some files have between, such as parts of speech, is
    left out. Files of words alone have no tags. Lines that begin a document (-DOCSTART-) are no sentences.

    Raises:
        UserError: a line has more or fewer cells than those before it.
    """
    sentences: list[tuple[int, list[list[str]]]] = []
    goes_on, width = False, 0
    for number, line in enumerate(text.split("\n"), start=1):
        cells = _cells(line)
        if not cells or cells[0] == _DOCUMENT:
            goes_on = False
            continue
        width = width or len(cells)
        if len(cells) != width:
            raise UserError(
                f"{name}, line {number}: {len(cells)} cells where the lines before have {width}. {_FORMAT}."
            )
        if not goes_on:
            sentences.append((number, []))
        sentences[-1][1].append(cells)
        goes_on = True

    def cells_of(column: str) -> list[object]:
        at = 0 if column == "tokens" else -1
        return [[cells[at] for cells in lines] for _, lines in sentences]

    columns = ["tokens", "tags"] if width > 1 else ["tokens"]
    return Table(name, "line", columns, [number for number, _ in sentences], cells_of)


def _cells(line: str) -> list[str]:
    """The cells between tabs or, where there is none, between spaces; none of a blank line."""
    line = line.rstrip(" \r")
    if not line.strip():
        return []
    return line.split("\t") if "\t" in line else re.split(" +", line.lstrip(" "))
