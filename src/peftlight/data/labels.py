"""Class labels: their names in order, and the index of each row's label."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftlight.data.cells import filled_cells, required_column, shown, without_column
from peftlight.data.table import Table
from peftlight.errors import UserError, listed, nearest

_INTEGER = re.compile(r"-?\d+")
_UNKNOWN = -1


def chosen_names(labels: Sequence[str] | None, train: Callable[[], Any]) -> list[str] | None:
    """The names in order: those given, or those of the training split, which `train` gives."""
    if labels is None:
        found: list[str] | None = train().label_names
        return found
    if len(set(labels)) < max(2, len(labels)):
        raise UserError(f"labels must be at least two different names; found {list(labels)}.")
    return list(labels)


def labels_of(
    tables: Sequence[Table], expected: Sequence[str], columns: Mapping[str, str], names: Sequence[str] | None
) -> tuple[NDArray[np.int32], list[str]]:
    """The index of every row's label, and the names that are counted: those given, or those found in the rows."""
    cells = _cells_of(tables, expected, columns)
    known = list(names) if names else _declared(tables, columns) or names_of(tables, cells)
    return np.concatenate([label_indices(*part, known) for part in zip(tables, cells, strict=True)]), known


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


def _cells_of(tables: Sequence[Table], expected: Sequence[str], columns: Mapping[str, str]) -> list[list[int | str]]:
    return [label_cells(table, required_column(table, "label", expected, columns)) for table in tables]


def label_cells(table: Table, column: str) -> list[int | str]:
    """The labels as the file has them: integers (written as text or not) or names."""
    labels: list[int | str] = []
    for index, cell in enumerate(filled_cells(table, column)):
        label = _label(cell)
        if label is None:
            problem = "is empty" if cell == "" else f"is {shown(cell)}; expected an integer or a name"
            raise UserError(f"{table.where(index)}: the label in {column!r} {problem}.")
        labels.append(label)
    return labels


def _label(cell: object) -> int | str | None:
    if isinstance(cell, int):
        return int(cell)
    if not isinstance(cell, str) or not cell.strip():
        return None
    name = cell.strip()
    return int(name) if _INTEGER.fullmatch(name) else name


def all_unknown(labels: Sequence[int | str]) -> bool:
    """Whether every label is -1, the hub's way to publish a split without its labels."""
    return all(label == _UNKNOWN for label in labels)


def names_of(tables: Sequence[Table], labels: Sequence[Sequence[int | str]]) -> list[str]:
    """The label names of a training split: sorted, or the numbers from 0 if all labels are integers."""
    _check_whole_numbers(tables, labels)
    values = {label for part in labels for label in part}
    name = tables[0].name
    if len(values) < 2:
        raise UserError(f"{name}: every row has the label {next(iter(values))!r}; there is nothing to tell apart.")
    if not all(isinstance(value, int) for value in values):
        return sorted(str(value) for value in values)
    numbers = sorted(value for value in values if isinstance(value, int))
    if numbers != list(range(len(numbers))):
        fix = f"Name them in order: labels: [{', '.join(repr(str(number)) for number in numbers)}]"
        expected = f"expected every number from 0 to {len(numbers) - 1}"
        raise UserError(f"{name}: the labels are {listed(numbers)}; {expected}. {fix}")
    return [str(number) for number in numbers]


def _check_whole_numbers(tables: Sequence[Table], labels: Sequence[Sequence[int | str]]) -> None:
    for table, part in zip(tables, labels, strict=True):
        for index, label in enumerate(part):
            if isinstance(label, int) and label < 0:
                raise UserError(f"{table.where(index)}: the label {label} is outside the range; labels count from 0.")


def label_indices(table: Table, labels: Sequence[int | str], names: Sequence[str]) -> NDArray[np.int32]:
    """The index of each row's label in `names`."""
    index_of = {name: index for index, name in enumerate(names)}
    # With numbers as names (stars from 1 to 5) a number is a name, never an index.
    counted = not any(_INTEGER.fullmatch(name) for name in names)
    indices = np.empty(len(labels), np.int32)
    for row, label in enumerate(labels):
        index = index_of.get(str(label))
        if index is None and counted and isinstance(label, int) and 0 <= label < len(names):
            index = label
        if index is None:
            raise UserError(f"{table.where(row)}: {_unknown_label(label, names)}")
        indices[row] = index
    return indices


def _unknown_label(label: int | str, names: Sequence[str]) -> str:
    order = f"The {len(names)} labels in order: {listed(names, 20)}."
    from_zero = list(names) == [str(index) for index in range(len(names))]
    if isinstance(label, int) and (from_zero or not any(_INTEGER.fullmatch(name) for name in names)):
        return f"the label {label} is outside the range 0 to {len(names) - 1}. {order}"
    return f"unknown label {label!r}.{nearest(str(label), names)} {order}"
