"""Which columns of a table could be meant, by their names and by what stands in them."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from peftlight.data.table import MISSING, Table
from peftlight.errors import listed, nearest

_SAMPLE = 200
_NUMBER = re.compile(r"\s*[-+]?[\d.,]+\s*")
_PLAIN = re.compile(r"\.\.\.|[^\W\d][\w./-]*( [\w./-]+)*")
_YAML_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_HOLD = {
    "messages": "messages, as a list of role and content",
    "tokens": "lists of words",
    "tags": "lists of tags",
    "image": "images or their paths",
    "label": "labels",
}
_TURN = ("role", "content")


def advice(table: Table, expected: Sequence[str], found: Mapping[str, str]) -> str:
    """The mapping that names columns for all that is expected; where there are none that could serve, what is missing.

    Args:
        table: the rows.
        expected: our names of columns.
        found: those of them that are there, with the table's names.
    """
    chosen = dict(found)
    for ours in expected:
        free = [column for column in table.columns if column not in chosen.values()]
        if ours not in chosen and (guess := _guess(table, ours, free)):
            chosen[ours] = guess
    if lost := [ours for ours in expected if ours not in chosen]:
        return (
            f"No other column holds {' or '.join(_HOLD.get(ours, 'texts') for ours in lost)}.{_other_keys(table, lost)}"
        )
    return f"Name the columns to use, for example: {mapping({ours: chosen[ours] for ours in expected})}"


def mapping(columns: Mapping[str, str]) -> str:
    """The line of a configuration that names the columns."""
    return f"columns: {{{', '.join(f'{ours}: {_as_yaml(theirs)}' for ours, theirs in columns.items())}}}"


def _as_yaml(name: str) -> str:
    """The name as YAML reads it within braces: in quotes where it would be read otherwise."""
    return name if _PLAIN.fullmatch(name) and name.lower() not in _YAML_WORDS else json.dumps(name, ensure_ascii=False)


def _guess(table: Table, ours: str, free: Sequence[str]) -> str | None:
    """The free column of the nearest name; else the first that holds texts, or for labels the fewest different ones."""
    cells = {column: _sample(table, column) for column in free}
    fitting = [column for column in free if cells[column] and all(_serves(ours, cell) for cell in cells[column])]
    near = nearest(ours, fitting)
    if named := [column for column in fitting if repr(column) in near]:
        return named[0]
    if ours == "label":
        return min(fitting, key=lambda column: len(set(map(str, cells[column]))), default=None)
    if ours not in _HOLD:
        lengths = {column: sum(map(len, map(str, cells[column]))) / len(cells[column]) for column in fitting}
        fitting = [column for column in fitting if 4 * lengths[column] >= max(lengths.values())]
    return next(iter(fitting), None)


def _sample(table: Table, column: str) -> list[object]:
    return [cell for cell in islice(iter(table.cells(column)), _SAMPLE) if cell is not MISSING and cell is not None]


def _serves(ours: str, cell: object) -> bool:
    if ours == "messages":
        return isinstance(cell, list) and all(isinstance(turn, dict) and turn.keys() >= {*_TURN} for turn in cell)
    if ours in ("tokens", "tags"):
        return isinstance(cell, list) and not any(isinstance(each, dict | list) for each in cell)
    if ours == "image":
        return isinstance(cell, str | dict | Path)
    if ours == "label":
        return isinstance(cell, str | int | float)
    return isinstance(cell, str) and bool(cell.strip()) and not _NUMBER.fullmatch(cell)


def _other_keys(table: Table, lost: Sequence[str]) -> str:
    """Conversations with other keys than ours."""
    for column in table.columns if "messages" in lost else ():
        turns = [turn for cell in _sample(table, column) if isinstance(cell, list) for turn in cell]
        if turns and isinstance(turns[0], dict):
            return f" Each message in {column!r} holds {listed(turns[0])}; expected {' and '.join(_TURN)}."
    return ""
