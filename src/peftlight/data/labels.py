"""Class labels: their names in order, and the index of each row's label."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from peftlight.data.cells import column_of, filled_cells, required_column, shown, without_column
from peftlight.data.column_guess import mapping
from peftlight.data.found_labels import MANY_ROWS, FoundLabels, Label, number_of
from peftlight.data.label_checks import check_classes
from peftlight.data.table import Table
from peftlight.errors import UserError, listed, nearest

_INTEGER = re.compile(r"-?\d+")
_WHOLE = re.compile(r"-?(0|[1-9]\d*)(\.0+)?")
"""A whole number as text; one that begins with zeros is a code, and so a name."""
_MARKS = ({"0", "1"}, {"0.0", "1.0"}, {"true", "false"})
_UNKNOWN = -1


def chosen_names(labels: Sequence[str] | None, train: Callable[[], Any]) -> list[str] | None:
    """The names in order: those given, or those of the training split, which `train` gives."""
    if labels is None:
        found: list[str] | None = train().label_names
        return found
    if len(set(labels)) < max(2, len(labels)):
        raise UserError(f"labels must be at least two different names; found {list(labels)}.")
    return list(labels)


class Labels(NamedTuple):
    """The labels of all rows."""

    indices: NDArray[np.int32]
    """Of each row's label, (rows,)."""
    names: list[str]
    """The names that are counted: those given, or those found in the rows."""
    findings: list[str]
    """What the user has to know of names that were found."""


def labels_of(
    tables: Sequence[Table],
    expected: Sequence[str],
    columns: Mapping[str, str],
    names: Sequence[str] | None,
    of_words: bool = False,
) -> Labels:
    """The index of every row's label among the names given, or among those found in the rows.

    Raises:
        UserError: a row has no label or an unknown one, or what stands in the rows is no class.
    """
    cells = _cells_of(tables, expected, columns)
    known, findings = list(names) if names else _declared(tables, columns), []
    if not known:
        found = FoundLabels(tables, cells, columns.get("label", "label"))
        known, findings = names_of(found, of_words), _remarks(found)
    indices = [label_indices(*part, known) for part in zip(tables, cells, strict=True)]
    return Labels(np.concatenate(indices), known, findings)


def _declared(tables: Sequence[Table], columns: Mapping[str, str]) -> list[str]:
    """The names that the tables themselves give their classes; none where a name could be mistaken for a number."""
    declared = [table.class_names.get(columns.get("label", "label"), []) for table in tables]
    clear = all(each == declared[0] for each in declared) and not any(map(_INTEGER.fullmatch, declared[0]))
    return list(declared[0]) if clear else []


def unlabelled(
    tables: Sequence[Table], expected: Sequence[str], columns: Mapping[str, str], names: Sequence[str] | None
) -> str:
    """Why the rows have no labels; empty if they have."""
    reason = without_column(tables, "label", columns)
    if reason:
        return reason
    unknown = all(all_unknown(part) for part in _cells_of(tables, expected, columns)) and "-1" not in (names or ())
    return f"every label in {tables[0].name} is -1, which means unknown" if unknown else ""


def _cells_of(tables: Sequence[Table], expected: Sequence[str], columns: Mapping[str, str]) -> list[list[Label]]:
    for table in tables:
        _refuse_columns_of_marks(table, expected, columns)
    return [label_cells(table, required_column(table, "label", expected, columns)) for table in tables]


def _refuse_columns_of_marks(table: Table, expected: Sequence[str], columns: Mapping[str, str]) -> None:
    """Several labels a row, each in a column of 0 and 1, where there is no column of labels."""
    missing = [ours for ours in expected if column_of(table, ours, columns) is None]
    others = [name for name in table.columns if name not in columns.values() and name not in expected]
    if missing != ["label"] or nearest("label", others):
        return
    marks = {name: {str(cell).lower() for cell in table.cells(name)} for name in others}
    marked = [name for name, cells in marks.items() if any(cells <= kind for kind in _MARKS)]
    if sum(len(marks[name]) > 1 for name in marked) > 1:
        ours = {name: columns.get(name, name) for name in expected} | {"label": marked[0]}
        raise UserError(
            f"{table.name} has no column {columns.get('label', 'label')!r}, but {len(marked)} columns of 0 and 1 "
            f"({listed(marked)}): several labels a row, and one is expected. To tell one of them: {mapping(ours)}"
        )


def label_cells(table: Table, column: str) -> list[Label]:
    """The labels as the file has them: integers (written as text or not) or names."""
    labels: list[Label] = []
    for index, cell in enumerate(cells := filled_cells(table, column)):
        label = _label(cell)
        if label is None:
            raise UserError(f"{table.where(index)}: the label in {column!r} {_no_label(cell, cells)}.")
        labels.append(label)
    return labels


def _no_label(cell: object, cells: Sequence[object]) -> str:
    if not isinstance(cell, list):
        return "is empty" if cell == "" else f"is {shown(cell)}; expected an integer or a name"
    several = sum(isinstance(each, list) and len(each) > 1 for each in cells)
    return (
        f"is {shown(cell)}; expected one label, an integer or a name. {several:,} of {len(cells):,} rows hold several "
        "labels: keep the rows of one label, without the list, or make a file of 0 and 1 for each label"
    )


def _label(cell: object) -> Label | None:
    if isinstance(cell, float) and math.isfinite(cell):
        return int(cell) if cell.is_integer() else repr(cell)
    if isinstance(cell, int):
        return int(cell)
    if not isinstance(cell, str) or not cell.strip():
        return None
    name = cell.strip()
    return int(float(name)) if _WHOLE.fullmatch(name) else name


def all_unknown(labels: Sequence[Label]) -> bool:
    """Whether every label is -1, the hub's way to publish a split without its labels."""
    return all(label == _UNKNOWN for label in labels)


def names_of(found: FoundLabels, of_words: bool = False) -> list[str]:
    """The names of the classes of a training split: sorted, numbers by their size.

    Raises:
        UserError: all rows have one label, or what stands in them is no class.
    """
    if len(found.counts) < 2:
        raise UserError(
            f"{found.tables[0].name}: every row has the label {next(iter(found.counts))!r}; there is nothing to tell "
            "apart."
        )
    check_classes(found, of_words)
    return found.names


def _remarks(found: FoundLabels) -> list[str]:
    """What the user has to know of labels that are classes without being named."""
    return [f"{found.tables[0].name}: {remark}." for remark in (*_of_numbers(found), *_of_rare(found))]


def _of_numbers(found: FoundLabels) -> Iterator[str]:
    numbers = found.numbers
    if found.are_numbers and numbers != list(range(len(numbers))):
        each = listed((f"{number} is {place}" for place, number in enumerate(numbers)), 20)
        span = f"{numbers[0]} to {numbers[-1]}" if len(numbers) == numbers[-1] - numbers[0] + 1 else listed(numbers)
        yield f"the labels {span} are {len(numbers)} classes, which the model counts from 0: {each}"
    elif numbers and not found.are_numbers:
        yield f"numbers and names are classes side by side: {found.told()}"


def _of_rare(found: FoundLabels) -> Iterator[str]:
    if found.rare and found.rows >= MANY_ROWS:
        each = listed((f"{label!r} ({found.where(label)})" for label in found.rare), 4)
        yield f"labels that come once in {found.rows:,}: {each}"


def label_indices(table: Table, labels: Sequence[Label], names: Sequence[str]) -> NDArray[np.int32]:
    """The index of each row's label in `names`."""
    index_of: dict[object, int] = {number_of(name): index for index, name in enumerate(names)}
    index_of |= {name: index for index, name in enumerate(names)}
    # With numbers as names (stars from 1 to 5) a number is a name, never an index.
    counted = not any(_INTEGER.fullmatch(name) for name in names)
    indices = np.empty(len(labels), np.int32)
    for row, label in enumerate(labels):
        index = index_of.get(str(label))
        if index is None and (number := number_of(label)) is not None:
            index = index_of.get(number)
        if index is None and counted and isinstance(label, int) and 0 <= label < len(names):
            index = label
        if index is None:
            raise UserError(f"{table.where(row)}: {_unknown_label(label, names)}")
        indices[row] = index
    return indices


def _unknown_label(label: Label, names: Sequence[str]) -> str:
    order = f"The {len(names)} labels in order: {listed(names, 20)}."
    from_zero = list(names) == [str(index) for index in range(len(names))]
    if isinstance(label, int) and (from_zero or not any(_INTEGER.fullmatch(name) for name in names)):
        return f"the label {label} is outside the range 0 to {len(names) - 1}. {order}"
    return f"unknown label {label!r}.{nearest(str(label), names)} {order}"
