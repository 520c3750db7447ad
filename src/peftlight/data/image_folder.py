"""Folders of images: one folder for each class, within a folder for each split or without splits."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from peftlight.data.image_rows import FolderTable
from peftlight.data.reading import READERS
from peftlight.data.shapes import ShapesPart
from peftlight.data.sources import Split, split_named
from peftlight.data.table import Table
from peftlight.errors import UserError, listed, nearest

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
"""Files that are taken for images."""

SAMPLES = {"shapes": ShapesPart()}
"""The sets that are built in."""


@dataclass(frozen=True)
class FolderPart:
    """One folder of images, or of folders that are named like the classes of the images in them; or one image."""

    path: Path
    """Where it is."""
    unit: str = "file"
    """What its rows are."""

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def digest(self) -> str:
        """The sha256 of the files' names; what is in them is hashed when the images are checked."""
        names = "\n".join(file.relative_to(self.path).as_posix() for file, _ in self._files())
        return hashlib.sha256(names.encode()).hexdigest()

    def read(self) -> Table:
        """The files, with the names of their folders as labels."""
        files = self._files()
        columns = {"image": [file for file, _ in files]}
        if files[0][1]:
            columns["label"] = [label for _, label in files]  # type: ignore[misc]
        return FolderTable(self.name, self.unit, list(columns), range(1, len(files) + 1), columns.__getitem__)

    def _files(self) -> list[tuple[Path, str]]:
        """Each image and the name of its class, which is empty where there are no folders of classes."""
        if self.path.is_file():
            return [(self.path, "")]
        classes = _folders(self.path)
        if not classes:
            return [(file, "") for file in _images(self.path)]
        loose = [file.name for file in _shown(self.path) if _is_image(file)]
        if loose:
            raise UserError(f"{self.path}: {listed(loose, 3)} lies beside the folders of the classes "
                            f"({listed(folder.name for folder in classes)}): move it into one of them.")  # fmt: skip
        return [(file, folder.name) for folder in classes for file in _images(folder)]


def image_splits(source: str) -> dict[str, Split] | None:
    """The splits of a folder of images, an image or a sample; None where the source is something else.

    Raises:
        UserError: there is no such sample, or it is not clear which folder belongs to which split.
    """
    if source.startswith("sample:"):
        return {"train": Split((_sample(source.removeprefix("sample:")),))}
    path = Path(source).expanduser()
    if path.is_file() and _is_image(path):
        return {"train": Split((FolderPart(path),))}
    if not path.is_dir():
        return None
    roles = {folder: split_named(folder.name) for folder in _folders(path)}
    if any(roles.values()):
        return _by_role(source, roles)
    if any(file.suffix.lower() in READERS for file in _shown(path)):
        return None
    if not roles and not any(_is_image(file) for file in _shown(path)):
        raise UserError(f"{source} holds neither images ({listed(ENDINGS, 20)}) nor folders of images.")
    return {"train": Split((FolderPart(path),))}


def _by_role(source: str, roles: dict[Path, str | None]) -> dict[str, Split]:
    unclear = [folder.name for folder, role in roles.items() if role is None]
    if unclear:
        named = listed(folder.name for folder, role in roles.items() if role)
        raise UserError(f"{source}: beside {named} it is not clear to which split {listed(unclear)} belongs. "
                        "Move it into one of them, or away.")  # fmt: skip
    return {
        role: Split(tuple(FolderPart(folder) for folder in roles if roles[folder] == role))
        for role in dict.fromkeys(role for role in roles.values() if role)
    }


def _sample(name: str) -> ShapesPart:
    if name not in SAMPLES:
        raise UserError(f"There is no sample {name!r} of images.{nearest(name, SAMPLES)} Samples: {listed(SAMPLES)}.")
    return SAMPLES[name]


def _images(folder: Path) -> list[Path]:
    files = _shown(folder)
    others = [file.name for file in files if not _is_image(file)]
    if others:
        raise UserError(f"{folder}: {listed(others, 3)} is no image ({listed(ENDINGS, 20)}): move it away.")
    if not files:
        raise UserError(f"{folder} holds no image. Put some there, or remove the folder.")
    return files


def _folders(folder: Path) -> list[Path]:
    return [path for path in _shown(folder) if path.is_dir()]


def _shown(folder: Path) -> list[Path]:
    """What is in the folder and not hidden, in the order of the names."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _is_image(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in ENDINGS
