"""Local files as tables: JSON, JSON Lines, CSV, TSV, CoNLL and parquet, with errors that name file and row."""

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftlight.data.conll import conll_table
from peftlight.data.delimited import delimited_table
from peftlight.data.layout import FOUND, Layout
from peftlight.data.table import MISSING, Table
from peftlight.errors import HALF, UserError, half_character, listed

_TOO_DEEP = "its lists and objects stand too deep in each other to be rows of data."


def read_file(path: str | Path, layout: Layout = FOUND) -> Table:
    """The rows of the file, read as its extension says; `layout` is what is known of a csv or tsv file's cells.

    Raises:
        UserError: the file cannot be read, or holds no rows, or a row is not like the others.
    """
    path = Path(path)
    table = READERS[path.suffix.lower()](path, layout)
    if not len(table):
        raise UserError(f"{path} has no rows.")
    return table


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}, line 1: it is UTF-16. Save the file as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        message = f"{path}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}). Save the file as UTF-8."
        raise UserError(message) from error
    if not text.strip():
        raise UserError(f"{path} is empty.")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(
            f"{path}, line {line}: it holds zero bytes, so it is UTF-16 or no text. Save the file as UTF-8."
        )
    return text


def _read_json(path: Path) -> Table:
    text = _text(path)
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: {_json_problem(text, error)}") from error
    except RecursionError as error:
        raise UserError(f"{path}: {_TOO_DEEP}") from error
    if isinstance(rows, dict):
        if not isinstance(rows.get("data"), list):
            found = listed(rows)
            raise UserError(
                f'{path} is one object with the keys {found}; expected a list of rows or {{"data": [...]}}.'
            )
        rows = rows["data"]
    if not isinstance(rows, list):
        raise UserError(f"{path} holds {_kind(rows)}; expected a list of objects, one per row.")
    return _table_of_objects(path, "row", list(enumerate(rows, start=1)))


def _json_problem(text: str, error: json.JSONDecodeError) -> str:
    if error.msg == "Extra data" and text[error.pos] == "{":
        return "a second object follows the first. One object per line is JSON Lines: name the file .jsonl."
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return f"not valid JSON ({error.msg}). The text ends too early: the file seems to be cut off."
    return f"not valid JSON ({error.msg} at column {error.colno})."


def _read_json_lines(path: Path) -> Table:
    rows: list[tuple[int, Any]] = []
    # Not splitlines(): it also breaks at characters that JSON allows inside a string, like U+2028.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {_json_problem(line, error)}") from error
        except RecursionError as error:
            raise UserError(f"{path}, line {number}: {_TOO_DEEP}") from error
    return _table_of_objects(path, "line", rows)


def _table_of_objects(path: Path, unit: str, rows: list[tuple[int, Any]]) -> Table:
    columns: dict[str, None] = {}
    for number, row in rows:
        if not isinstance(row, dict):
            expected = 'expected an object like {"column": value}'
            raise UserError(f"{path}, {unit} {number}: the row is {_kind(row)}; {expected}.")
        columns.update(dict.fromkeys(row))
        if half_character([*row]):
            raise UserError(f"{path}, {unit} {number}: the name of a column ({[*row]!a}) holds {HALF}.")

    def cells(column: str) -> list[object]:
        return [row.get(column, MISSING) for _, row in rows]

    return Table(str(path), unit, list(columns), [number for number, _ in rows], cells)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _read_parquet(path: Path) -> Table:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"Reading {path} needs the package pyarrow: pip install pyarrow") from error
    try:
        return arrow_table(str(path), pq.read_table(path))
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is not a whole parquet file ({str(error).splitlines()[0]}).") from error


def arrow_table(name: str, table: Any) -> Table:
    """A pyarrow table; a column becomes Python objects when it is asked for."""
    import pyarrow as pa

    def cells(column: str) -> Sequence[object]:
        arrow = table.column(column)
        return _ArrowCells(arrow) if pa.types.is_struct(arrow.type) else _python_cells(name, column, arrow)

    return Table(name, "row", table.column_names, range(1, len(table) + 1), cells, _class_names(table.schema.metadata))


def _python_cells(name: str, column: str, arrow: Any) -> list[object]:
    try:
        return arrow.to_pylist()
    except UnicodeDecodeError:
        pass
    for number, cell in enumerate(arrow, start=1):
        try:
            cell.as_py()
        except UnicodeDecodeError as error:
            byte = f"0x{error.object[error.start]:02x}"
            raise UserError(f"{name}, row {number}: {column!r} is not UTF-8 (byte {byte}).") from None
    raise AssertionError("all cells of a column that is not UTF-8 are")


def _class_names(metadata: Any) -> dict[str, list[str]]:
    """The names that the package datasets writes beside a column of classes, which are stored as numbers."""
    features = json.loads((metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    kinds = {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    each = {name: feature.get("feature", feature) for name, feature in kinds.items()}  # in columns of lists, one deeper
    return {name: kind["names"] for name, kind in each.items() if kind.get("_type") == "ClassLabel"}


class _ArrowCells(Sequence[object]):
    """The cells of a column of structures, each made when it is asked for: images can be more than the memory holds."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        return self._column[index].as_py()


def _read_cells(path: Path, layout: Layout) -> Table:
    return delimited_table(str(path), _text(path), DELIMITERS[path.suffix.lower()], layout)


DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""The separator that files of cells have most often, by their extension."""

READERS: dict[str, Callable[[Path, Layout], Table]] = {
    ".json": lambda path, _: _read_json(path),
    ".jsonl": lambda path, _: _read_json_lines(path),
    ".csv": _read_cells,
    ".tsv": _read_cells,
    ".conll": lambda path, _: conll_table(str(path), _text(path)),
    ".parquet": lambda path, _: _read_parquet(path),
}
"""The file formats by their extension."""

LINE_FORMATS = (".jsonl", ".csv", ".tsv", ".conll")
"""Those whose rows are numbered by the line of the file."""
