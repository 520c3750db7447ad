"""From what the user names as source to the files of each split."""

import glob
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from peftlight.data.hub import hub_parts
from peftlight.data.layout import FOUND, Layout
from peftlight.data.reading import DELIMITERS, LINE_FORMATS, READERS, read_file
from peftlight.data.table import Table
from peftlight.errors import UserError, listed, nearest

SAMPLES = Path(__file__).parent / "samples"
"""The folder of the small data sets that `sample:NAME` names."""

_SPLITS = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
_ENDING = re.compile(rf"(?:^|[^a-z])({'|'.join(_SPLITS)})$", re.IGNORECASE)
_SHARD = re.compile(r"-\d+-of-\d+$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


class Part(Protocol):
    """One file or one hub split."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def unit(self) -> str:
        """What its rows are numbered by: "line" or "row"."""

    def digest(self) -> str:
        """The sha256 of its content."""

    def read(self) -> Table:
        """Its rows."""


@dataclass(frozen=True)
class FilePart:
    """One local file."""

    path: Path
    """Where it is."""
    layout: Layout = FOUND
    """What the user says of its cells."""

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def unit(self) -> str:
        """Line in formats made of lines."""
        return "line" if self.path.suffix.lower() in LINE_FORMATS else "row"

    def digest(self) -> str:
        """The sha256 of the bytes."""
        sha256 = hashlib.sha256()
        try:
            with open(self.path, "rb") as file:
                while block := file.read(1 << 20):
                    sha256.update(block)
        except OSError as error:
            raise UserError(f"Cannot read {self.path}: {error.strerror}.") from error
        return sha256.hexdigest()

    def read(self) -> Table:
        """The rows."""
        return read_file(self.path, self.layout)


@dataclass(frozen=True)
class Split:
    """The parts whose rows, one part after the other, make a split."""

    parts: tuple[Part, ...]
    """Files in the order of their names, or one hub split."""

    def digest(self) -> str:
        """The sha256 over the contents of all parts."""
        return hashlib.sha256("\n".join(part.digest() for part in self.parts).encode()).hexdigest()

    def read(self) -> list[Table]:
        """The rows of each part."""
        return [part.read() for part in self.parts]


Special = Callable[[str], dict[str, Split] | None]
"""The splits of a source that only one kind of data knows, such as folders of images; None for every other source."""


def find_splits(
    source: str,
    subset: str | None,
    others: Mapping[str, str | None],
    layout: Layout = FOUND,
    special: Special = lambda source: None,
) -> dict[str, Split]:
    """The splits of `source` by role; `others` gives roles (validation, test, predict) a source of their own.

    Raises:
        UserError: nothing is found there, it is not clear which file belongs to which split, or a layout is given and
            there is no file that has one.
    """
    splits = special(source) or _splits_of(source, subset)
    for role, own in others.items():
        if own is not None:
            splits[role] = _one_split(role, own, special(own) or _splits_of(own, subset if _is_hub_id(own) else None))
    return _laid_out(splits, layout) if layout.is_given else splits


def _laid_out(splits: Mapping[str, Split], layout: Layout) -> dict[str, Split]:
    """The splits, with their files of cells read as the user says."""
    parts = [part for split in splits.values() for part in split.parts]
    if not any(_has_cells(part) for part in parts):
        raise UserError(
            f"delimiter and quoting are for files that end in {listed(DELIMITERS)}; the source is {parts[0].name}. "
            "Leave them out."
        )
    return {role: Split(tuple(replace(part, layout=layout) if _has_cells(part) else part for part in split.parts))  # type: ignore[type-var]
            for role, split in splits.items()}  # fmt: skip


def _has_cells(part: Part) -> bool:
    return isinstance(part, FilePart) and part.path.suffix.lower() in DELIMITERS


def _one_split(role: str, source: str, splits: Mapping[str, Split]) -> Split:
    if role in splits:
        return splits[role]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise UserError(f"{role}_source {source!r} holds the splits {listed(splits)}: name the one file to use.")


def _splits_of(source: str, subset: str | None) -> dict[str, Split]:
    if _is_hub_id(source):
        return _hub_splits(source, subset)
    if subset is not None:
        raise UserError(f"subset {subset!r} is for data sets of the hub, but the source {source!r} is local.")
    if source.startswith("sample:"):
        return {"train": Split((FilePart(_sample(source)),))}
    path = Path(source).expanduser()
    if path.is_dir():
        return _assign(source, sorted(file for file in path.iterdir() if _readable(file)))
    if any(sign in source for sign in "*?["):
        return _assign(source, sorted(file for name in glob.glob(str(path)) if _readable(file := Path(name))))
    return {"train": Split((FilePart(_existing(path)),))}


def split_named(name: str) -> str | None:
    """The role of a split or a folder with this name."""
    return _SPLITS.get(name.lower())


def _is_hub_id(source: str) -> bool:
    path = Path(source).expanduser()
    if path.exists() or path.suffix.lower() in READERS or not _HUB_ID.fullmatch(source):
        return False
    # With a local folder of that name, a misspelt file is far likelier than a hub user called like the folder.
    return "/" not in source or not path.parent.is_dir()


def _hub_splits(source: str, subset: str | None) -> dict[str, Split]:
    parts = hub_parts(source, subset)
    splits: dict[str, Split] = {}
    for name, part in parts.items():
        role = split_named(name)
        if role is not None:
            splits.setdefault(role, Split((part,)))
    if not splits:
        raise UserError(f"{source!r} has the splits {listed(parts)}; expected train, validation or test among them.")
    return splits


def _readable(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in READERS and not path.name.startswith(".")


def _assign(source: str, files: list[Path]) -> dict[str, Split]:
    if not files:
        raise UserError(f"{source} holds no data file ({listed(READERS)}).")
    roles = {file: _role(file) for file in files}
    if not any(roles.values()):
        return {"train": Split(tuple(map(FilePart, files)))}
    unclear = [file.name for file, role in roles.items() if role is None]
    if unclear:
        endings = "Let the names end in train, validation or test, or give a glob that leaves the others out."
        raise UserError(f"{source}: it is not clear to which split {listed(unclear)} belongs. {endings}")
    return {
        role: Split(tuple(FilePart(file) for file in files if roles[file] == role))
        for role in dict.fromkeys(role for role in roles.values() if role)
    }


def _role(file: Path) -> str | None:
    found = _ENDING.search(_SHARD.sub("", file.stem))
    return _SPLITS[found[1].lower()] if found else None


def _existing(path: Path) -> Path:
    if not path.exists():
        if not path.parent.is_dir():
            raise UserError(f"There is no file {path}: the folder {path.parent} does not exist.")
        siblings = sorted(other.name for other in path.parent.iterdir())
        where = nearest(path.name, siblings) or f" It was looked for in {path.parent.resolve()}."
        raise UserError(f"There is no file {path}.{where}")
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: cannot read files ending in {path.suffix!r}; known are {listed(READERS)}.")
    return path


def _sample(source: str) -> Path:
    name = source.removeprefix("sample:")
    samples = {file.stem: file for file in sorted(SAMPLES.iterdir()) if _readable(file)} if SAMPLES.is_dir() else {}
    if name not in samples:
        raise UserError(f"There is no sample {name!r}.{nearest(name, samples)} Samples: {listed(samples)}.")
    return samples[name]
