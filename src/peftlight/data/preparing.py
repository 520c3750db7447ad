"""The data sets that a stage of the Trainer needs: which split serves which role, and which rows are set aside."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from peftlight.data.encoder import Purpose
from peftlight.data.sources import Part, Split
from peftlight.data.summary import RowCounts
from peftlight.errors import UserError, listed

if TYPE_CHECKING:
    from peftlight.data.family import DataFamily

ROLES: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "validation", "test", "predict"),
}
"""What each stage of the Trainer reads; None is all of them."""


class Content(Protocol):
    """All rows of a split, checked."""

    @property
    def label_names(self) -> list[str] | None:
        """The names of the classes; None where there are none."""

    @property
    def unlabelled(self) -> str:
        """Why the rows have no labels; empty if they have, or if none were asked for."""

    @property
    def findings(self) -> list[str]:
        """What was found in reading them that the user has to know."""

    def __len__(self) -> int:
        """How many rows there are."""

    def kept(self) -> NDArray[np.bool_]:
        """Per row: whether it has something to learn from or to predict."""

    def where(self, row: int, parts: Sequence[Part]) -> str:
        """What messages call the row; `parts` are those of its split."""


C = TypeVar("C", bound=Content)


class Preparation(Generic[C]):
    """The data sets of one stage by role, and an account of what went into them."""

    def __init__(self, data: "DataFamily", splits: Mapping[str, Split], stage: str | None) -> None:
        self.data = data
        self.splits = splits
        self.datasets: dict[str, Dataset[Any]] = {}
        self.summaries: dict[str, RowCounts] = {}
        self.notices: list[str] = []
        self.findings: list[str] = []
        self._contents: dict[tuple[str, Purpose], C] = {}
        self._digests: dict[str, str] = {}
        self._used: list[str] = []
        self.label_names: list[str] | None = None
        self.label_names = data.find_label_names(self._train_content)
        for role in ROLES[stage]:
            self._add(role)
        self.fingerprint = hashlib.sha256("\n".join(sorted(self._used)).encode()).hexdigest()

    # ---- what a kind of data defines

    def read(self, name: str, purpose: Purpose) -> C:
        """All rows of the split of that name, checked."""
        raise NotImplementedError

    def summarize(self, name: str, content: C, rows: NDArray[np.int64]) -> RowCounts:
        """What becomes of some of a split's rows."""
        raise NotImplementedError

    def dataset(self, role: str, content: C, rows: NDArray[np.int64]) -> Dataset[Any]:
        """Some rows, as they serve that role."""
        raise NotImplementedError

    def digest_of(self, name: str) -> str:
        """The sha256 of a split's content."""
        return self.splits[name].digest()

    # ---- roles

    def _add(self, role: str) -> None:
        split = self._split_for(role)
        if split is None:
            return
        purpose: Purpose = "test" if role == "test" else "predict" if role == "predict" else "train"
        content = self._content(split, purpose)
        if content.unlabelled:
            split = self._instead_of(content)
            content = self._content(split, "train")
        rows = self._rows(split, len(content))
        summary = self.summarize(_name(split), content, rows)
        if not summary.kept:
            raise UserError(f"The {role} split has no row to use: {summary}.")
        if role == "train":
            self.findings += _without_rows(content, rows)
        self.summaries[role] = summary
        self.datasets[role] = self.dataset(role, content, rows[content.kept()[rows]])
        self._used.append(f"{role} {self.digest(_name(split))} {self._share(split)}")

    def _split_for(self, role: str) -> str | None:
        """The split that a role reads; "aside" is the part of the training rows set aside for validation."""
        if role == "predict" and "predict" not in self.splits:
            return "test" if "test" in self.splits else self._split_for("validation")
        if role == "validation" and role not in self.splits:
            return "aside" if "train" in self.splits else None
        return role if role in self.splits else None

    def serving(self, role: str) -> Split:
        """The split whose rows a role reads."""
        split = self._split_for(role)
        assert split is not None
        return self.splits[_name(split)]

    def where(self, row: int) -> str:
        """What messages call the training row of that number."""
        return self._train_content().where(row, self.splits["train"].parts)

    def _instead_of(self, unlabelled: C) -> str:
        split = self._split_for("validation")
        if split is None:
            raise UserError(f"There is nothing to test on: {unlabelled.unlabelled}.")
        self.notices.append(
            f"The test split has no labels, so test uses the validation split: {unlabelled.unlabelled}."
        )
        return split

    def _train_content(self) -> C:
        if "train" not in self.splits:
            raise UserError("There is no training split to find the labels in. Name them in order: labels: [..., ...]")
        return self._content("train", "train")

    def _content(self, split: str, purpose: Purpose) -> C:
        name = _name(split)
        if (name, purpose) not in self._contents:
            self._contents[name, purpose] = self.read(name, purpose)
            self.findings += self._contents[name, purpose].findings
        return self._contents[name, purpose]

    def _rows(self, split: str, count: int) -> NDArray[np.int64]:
        if not self._share(split):
            return np.arange(count)
        size = _rows_aside(self.data.validation_size, count)
        # A generator of its own: the same rows whatever else has drawn random numbers.
        order = np.random.default_rng(self.data.split_seed).permutation(count)
        return np.sort(order[:size] if split == "aside" else order[size:])

    def _share(self, split: str) -> str:
        """Which part of the rows a split is, when it is not all of them."""
        if split not in ("train", "aside") or "validation" in self.splits:
            return ""
        return f"{split} {self.data.validation_size} {self.data.split_seed}"

    def digest(self, name: str) -> str:
        """The sha256 of a split's content, computed once."""
        if name not in self._digests:
            self._digests[name] = self.digest_of(name)
        return self._digests[name]


def _without_rows(content: Content, rows: NDArray[np.int64]) -> list[str]:
    """Which classes have no row to learn from, where each row has one."""
    names, labels = content.label_names, getattr(content, "labels", None)
    if names is None or labels is None:
        return []
    lost = [
        name for name, count in zip(names, np.bincount(labels[rows], minlength=len(names)), strict=True) if not count
    ]
    return [f"No training row is of the class {listed(lost)}: the model cannot learn it."] if lost else []


def _name(split: str) -> str:
    return "train" if split == "aside" else split


def _rows_aside(size: int | float, count: int) -> int:
    rows = size if isinstance(size, int) else max(1, round(size * count))
    if not 0 < rows < count:
        raise UserError(f"validation_size={size} leaves no rows to train on: there are {count}. Give fewer, or a file.")
    return rows
