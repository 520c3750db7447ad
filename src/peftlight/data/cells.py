"""Which column is meant, and whether its cells are what a data set family needs."""

from collections.abc import Mapping, Sequence

from peftlight.data.column_guess import advice
from peftlight.data.table import MISSING, Table
from peftlight.errors import HALF, UserError, half_character, listed, nearest


def check_names(columns: Mapping[str, str], known: Sequence[str]) -> None:
    """Refuse a `columns` mapping for a name that the family does not have."""
    for ours in columns:
        if ours not in known:
            raise UserError(f"columns: unknown name {ours!r}.{nearest(ours, known)} Known names: {listed(known)}.")


def column_of(table: Table, ours: str, columns: Mapping[str, str]) -> str | None:
    """The table's column for our name; None when it has none."""
    theirs = columns.get(ours, ours)
    return theirs if theirs in table.columns else None


def required_column(table: Table, ours: str, expected: Sequence[str], columns: Mapping[str, str]) -> str:
    """The table's column for our name.

    Raises:
        UserError: there is none; the message holds the mapping that would name it.
    """
    theirs = columns.get(ours, ours)
    if theirs not in table.columns:
        missing = [name for name in expected if column_of(table, name, columns) is None]
        wanted = listed(columns.get(name, name) for name in expected)
        found = f"Columns found: {listed(table.columns, 20)}. Columns expected: {wanted}."
        meant = " and no column ".join(_meant(name, columns) for name in missing)
        there = {name: column for name in expected if (column := column_of(table, name, columns))}
        raise UserError(f"{table.name} has no column {meant}. {found} {advice(table, expected, there)}")
    return theirs


def without_column(tables: Sequence[Table], ours: str, columns: Mapping[str, str]) -> str:
    """Why the rows have no answers, when a table has no column for our name; empty if all have."""
    for table in tables:
        if column_of(table, ours, columns) is None:
            found = f"{table.name} has no column {columns.get(ours, ours)!r} among {listed(table.columns)}"
            return f"{found}; if another one holds it, name it: columns: {{{ours}: ...}}"
    return ""


def _meant(ours: str, columns: Mapping[str, str]) -> str:
    return f"{columns[ours]!r} (columns maps {ours} to it)" if ours in columns else repr(ours)


def filled_cells(table: Table, column: str) -> Sequence[object]:
    """The cells of a column, none of them missing or null."""
    cells = table.cells(column)
    for index, cell in enumerate(cells):
        if cell is MISSING:
            raise UserError(f"{table.where(index)}: the row has no {column!r}. Every row needs it.")
        if cell is None:
            raise UserError(f"{table.where(index)}: {column!r} is null. Fill the cell or remove the row.")
        if half := half_character(cell):
            raise UserError(f"{table.where(index)}: {column!r} holds {half!a}, {HALF}.")
    return cells


def text_cells(table: Table, column: str, may_be_empty: bool = False) -> list[str]:
    """The cells of a column of texts."""
    texts: list[str] = []
    for index, cell in enumerate(filled_cells(table, column)):
        if not isinstance(cell, str):
            raise UserError(f"{table.where(index)}: {column!r} is {shown(cell)}; expected a text.")
        if not may_be_empty and not cell.strip():
            raise UserError(f"{table.where(index)}: {column!r} is an empty text. Fill the cell or remove the row.")
        texts.append(cell)
    return texts


def shown(cell: object) -> str:
    """A cell and its type, short enough for a message."""
    text = repr(cell)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(cell).__name__})"
