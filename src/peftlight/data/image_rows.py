"""Rows of images: where each one lies, what messages call it, and its label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftlight.data.cells import filled_cells, required_column, shown
from peftlight.data.encoder import Purpose
from peftlight.data.labels import labels_of, unlabelled
from peftlight.data.table import Table
from peftlight.errors import UserError, nearest

_EXPECTED = ("image", "label")


@dataclass(frozen=True)
class ImageFile:
    """One image, still encoded: a file of its own, or a cell of a table."""

    name: str
    """What predictions call it: its path, or the path that stands in its cell."""
    where: str
    """What error messages call it."""
    path: Path | None = None
    """Its file; None where the cell holds it."""
    cells: Sequence[Any] = ()
    """The column of cells otherwise; a cell is read only when it is asked for."""
    index: int = 0
    """Which of the cells."""

    def content(self) -> bytes:
        """The encoded image."""
        try:
            return self.cells[self.index]["bytes"] if self.path is None else self.path.read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read {self.where}: {error.strerror}.") from error


@dataclass(frozen=True, eq=False)
class ImageRows:
    """All images of a split."""

    images: list[ImageFile]
    """One for each row."""
    labels: NDArray[np.int32] | None = None
    """Per row: its class."""
    label_names: list[str] | None = None
    """The names of the classes."""
    unlabelled: str = ""
    """Why the rows have no labels; empty if they have, or if none were asked for."""
    findings: list[str] = field(default_factory=list)
    """What was found in reading the rows that the user has to know."""

    def __len__(self) -> int:
        return len(self.images)

    def kept(self) -> NDArray[np.bool_]:
        """Every row is."""
        return np.ones(len(self), np.bool_)

    def where(self, row: int, parts: Sequence[object]) -> str:
        """The image's file, or the cell that holds it."""
        return self.images[row].where


class FolderTable(Table):
    """The images of a folder; each row is named by its file."""

    def where(self, index: int) -> str:
        """The file."""
        return str(self.cells("image")[index])


def image_rows(
    tables: Sequence[Table], purpose: Purpose, columns: Mapping[str, str], names: Sequence[str] | None
) -> ImageRows:
    """The images of all tables, with labels unless they are only to be predicted.

    Raises:
        UserError: a cell is no image or no label, or there is no such file or class.
    """
    expected = _EXPECTED[:1] if purpose == "predict" else _EXPECTED
    images = [
        image for table in tables for image in _images_of(table, required_column(table, "image", expected, columns))
    ]
    notices = [notice for table in tables for notice in table.notices]
    if purpose == "predict":
        return ImageRows(images, findings=notices)
    reason = _without_class_folders(tables)
    if purpose == "test":
        reason = reason or unlabelled(tables, expected, columns, names)
        if reason:
            return ImageRows(images, unlabelled=reason, findings=notices)
    if reason:
        raise UserError(f"{reason}. Expected one folder for each class, as {tables[0].name}/CLASS/*.png")
    labels, known, findings = labels_of(tables, expected, columns, names)
    return ImageRows(images, labels, known, findings=[*notices, *findings])


def _without_class_folders(tables: Sequence[Table]) -> str:
    flat = [table.name for table in tables if isinstance(table, FolderTable) and "label" not in table.columns]
    return f"{flat[0]} holds images, but no folders that are named like their classes" if flat else ""


def _images_of(table: Table, column: str) -> list[ImageFile]:
    cells = filled_cells(table, column)
    return [_image_of(table, cells, index, cell, column) for index, cell in enumerate(cells)]


def _image_of(table: Table, cells: Sequence[object], index: int, cell: object, column: str) -> ImageFile:
    where = table.where(index)
    if isinstance(cell, Path):
        return ImageFile(str(cell), where, cell)
    if isinstance(cell, str) and cell.strip():
        path = _existing(Path(table.name).parent / Path(cell.strip()).expanduser(), where)
        return ImageFile(str(path), f"{where} ({path})", path)
    if isinstance(cell, dict) and isinstance(cell.get("bytes"), bytes):
        name = cell.get("path")
        return ImageFile(str(name or where), f"{where} ({name})" if name else where, cells=cells, index=index)
    if isinstance(cell, dict) and isinstance(cell.get("path"), str):
        path = _existing(Path(cell["path"]), where)
        return ImageFile(str(path), f"{where} ({path})", path)
    raise UserError(f"{where}: {column!r} is {shown(cell)}; expected an image or the path of its file.")


def _existing(path: Path, where: str) -> Path:
    if path.is_file():
        return path
    if not path.parent.is_dir():
        raise UserError(f"{where}: there is no image {path}: the folder {path.parent} does not exist.")
    siblings = [other.name for other in path.parent.iterdir()]
    raise UserError(f"{where}: there is no image {path}.{nearest(path.name, siblings)}")
