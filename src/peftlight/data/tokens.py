"""Tokenized rows: flat arrays, the data set over them, and how they are put together."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from peftlight.data.sources import Part

IGNORED = -100
"""The label of a token that is not trained."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """All rows of a split, also those without anything to train; row i is `input_ids[offsets[i]:offsets[i + 1]]`."""

    input_ids: NDArray[np.int32]
    """The tokens of all rows, each cut to the maximum length."""
    offsets: NDArray[np.int64]
    """Where each row begins, and where the last one ends."""
    lengths: NDArray[np.int32]
    """How many tokens each row has before it is cut."""
    numbers: NDArray[np.int64]
    """The line or row number of each row in its file."""
    files: NDArray[np.int32]
    """Which of the split's files each row is from."""
    trained: NDArray[np.uint8] | None = None
    """Per token: 1 where it is a label of a language model."""
    labels: NDArray[np.int32] | None = None
    """Per row: its class."""
    token_types: NDArray[np.uint8] | None = None
    """Per token: which text of a pair it is from."""
    words: NDArray[np.int32] | None = None
    """Per token: the number of the word, counted from 0 in its row, that begins with it; -100 where none does."""
    tags: NDArray[np.int32] | None = None
    """Per token: the class of the word that begins with it; -100 where none does."""
    targets: NDArray[np.int32] | None = None
    """The target tokens of all rows, for encoder-decoders; row i is `targets[target_offsets[i]:target_offsets[i + 1]]`.
    """
    target_offsets: NDArray[np.int64] | None = None
    """Where each row's target begins, and where the last one ends."""
    target_lengths: NDArray[np.int32] | None = None
    """How many target tokens each row has before it is cut."""
    label_names: list[str] | None = None
    """The names of the classes."""
    unlabelled: str = ""
    """Why the rows have no labels; empty if they have, or if none were asked for."""
    findings: list[str] = field(default_factory=list)
    """What was found in reading the rows that the user has to know."""

    def __len__(self) -> int:
        return len(self.lengths)

    def label_counts(self) -> NDArray[np.int64]:
        """How many labels of each row enter the loss; a text's own first token is never predicted, and not counted."""
        if self.target_offsets is not None:
            return np.diff(self.target_offsets)
        if self.tags is not None:
            return self._counts(self.tags != IGNORED)
        if self.trained is None:
            return np.full(len(self), 0 if self.labels is None else 1, np.int64)
        return self._counts(self.trained, skip=1)

    def where(self, row: int, parts: Sequence[Part]) -> str:
        """File and number of the row."""
        part = parts[int(self.files[row])]
        return f"{part.name}, {part.unit} {self.numbers[row]}"

    def _counts(self, marks: NDArray[Any], skip: int = 0) -> NDArray[np.int64]:
        """How many tokens of each row are marked, its first `skip` left out."""
        total = np.concatenate([[0], np.cumsum(marks, dtype=np.int64)])
        starts, ends = self.offsets[:-1], self.offsets[1:]
        return total[ends] - total[np.minimum(starts + skip, ends)]

    def kept(self) -> NDArray[np.bool_]:
        """Per row: whether it has something to learn from or to predict."""
        if any(labels is not None for labels in (self.trained, self.tags, self.targets)):
            return self.label_counts() > 0
        return np.diff(self.offsets) > 0


class Item(TypedDict, total=False):
    """One row as the data set gives it."""

    input_ids: NDArray[np.int32]
    row: int
    labels: NDArray[np.int32] | int
    words: NDArray[np.int32]
    token_type_ids: NDArray[np.uint8]


class TokenDataset(Dataset[Item]):
    """Some rows of tokens, each with its number in the source."""

    def __init__(self, tokens: Tokens, rows: NDArray[np.int64]) -> None:
        self.tokens = tokens
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        tokens, row = self.tokens, int(self.rows[index])
        span = slice(int(tokens.offsets[row]), int(tokens.offsets[row + 1]))
        item = Item(input_ids=tokens.input_ids[span], row=row)
        if tokens.trained is not None:
            item["labels"] = np.where(tokens.trained[span], tokens.input_ids[span], IGNORED).astype(np.int32)
        if tokens.labels is not None:
            item["labels"] = int(tokens.labels[row])
        if tokens.targets is not None and tokens.target_offsets is not None:
            item["labels"] = tokens.targets[tokens.target_offsets[row] : tokens.target_offsets[row + 1]]
        if tokens.tags is not None:
            item["labels"] = tokens.tags[span]
        if tokens.words is not None:
            item["words"] = tokens.words[span]
        if tokens.token_types is not None:
            item["token_type_ids"] = tokens.token_types[span]
        return item


@dataclass(frozen=True)
class EncodedRow:
    """One row after tokenizing."""

    input_ids: list[int]
    """Its tokens, cut to the maximum length."""
    length: int
    """How many there were before."""
    trained: NDArray[np.uint8] | None = None
    """Per token: 1 where it is a label."""
    token_types: list[int] | None = None
    """Per token: which text of a pair it is from."""
    words: NDArray[np.int32] | None = None
    """Per token: the number of the word that begins with it; -100 where none does."""
    target: list[int] | None = None
    """The tokens that an encoder-decoder learns to write, cut to their maximum length."""
    target_length: int = 0
    """How many of those there were before."""


@dataclass
class TokenBuilder:
    """Collects encoded rows into `Tokens`."""

    ids: list[NDArray[np.int32]] = field(default_factory=list)
    """The tokens row by row."""
    trained: list[NDArray[np.uint8]] = field(default_factory=list)
    """The masks of the rows that have one."""
    types: list[NDArray[np.uint8]] = field(default_factory=list)
    """The token types of the rows that have them."""
    words: list[NDArray[np.int32]] = field(default_factory=list)
    """The words' numbers of the rows that have them."""
    lengths: list[int] = field(default_factory=list)
    """The lengths before cutting."""
    targets: list[NDArray[np.int32]] = field(default_factory=list)
    """The targets of the rows that have one."""
    target_lengths: list[int] = field(default_factory=list)
    """The targets' lengths before cutting."""

    def add(self, row: EncodedRow) -> None:
        """Append one row."""
        self.ids.append(np.asarray(row.input_ids, np.int32))
        self.lengths.append(row.length)
        if row.trained is not None:
            self.trained.append(row.trained)
        if row.token_types is not None:
            self.types.append(np.asarray(row.token_types, np.uint8))
        if row.words is not None:
            self.words.append(row.words)
        if row.target is not None:
            self.targets.append(np.asarray(row.target, np.int32))
            self.target_lengths.append(row.target_length)

    def tokens(self, numbers: list[int], files: list[int]) -> Tokens:
        """All rows added so far; `numbers` and `files` say where each came from."""
        return Tokens(
            input_ids=np.concatenate(self.ids),
            offsets=_offsets(self.ids),
            lengths=np.asarray(self.lengths, np.int32),
            numbers=np.asarray(numbers, np.int64),
            files=np.asarray(files, np.int32),
            trained=np.concatenate(self.trained) if self.trained else None,
            token_types=np.concatenate(self.types) if self.types else None,
            words=np.concatenate(self.words) if self.words else None,
            targets=np.concatenate(self.targets) if self.targets else None,
            target_offsets=_offsets(self.targets) if self.targets else None,
            target_lengths=np.asarray(self.target_lengths, np.int32) if self.targets else None,
        )


def _offsets(rows: list[NDArray[np.int32]]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
