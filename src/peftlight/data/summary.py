"""What became of the rows of a split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peftlight.data.tokens import Tokens
from peftlight.errors import listed

_NAMED = 5


@dataclass(frozen=True)
class RowCounts:
    """Counts of one split's rows."""

    rows: int
    """Rows of the split."""
    kept: int
    """Rows that are used."""


@dataclass(frozen=True)
class Summary(RowCounts):
    """Counts of one split's rows and tokens."""

    truncated: int
    """Rows longer than max_length, which were cut."""
    empty: int
    """Rows without any label token (or, to predict from, without any token), which were dropped."""
    empty_rows: list[str]
    """Where the first of those stand."""
    tokens: int
    """Tokens of the kept rows."""
    label_tokens: int
    """Labels of the kept rows that enter the loss: tokens for a language model, rows for classification."""
    longest: int
    """Tokens of the longest row before cutting."""
    longest_row: str = ""
    """Where that one stands."""
    largest_token: int = -1
    """The largest number of a token in the whole split; -1 where there is none."""
    truncated_targets: int = 0
    """Targets longer than max_target_length, which were cut."""
    longest_target: int = 0
    """Tokens of the longest target before cutting; 0 where there are none."""
    longest_target_row: str = ""
    """Where that one stands."""

    def __str__(self) -> str:
        text = f"{self.rows:,} rows, {self.tokens:,} tokens, {self.label_tokens:,} labels, longest {self.longest:,}"
        if self.truncated:
            text += f"; {self.truncated:,} truncated"
        if self.longest_target:
            text += f"; longest target {self.longest_target:,}, {self.truncated_targets:,} targets truncated"
        if self.empty:
            text += f"; {self.empty:,} dropped without labels ({self.named()})"
        return text

    def named(self) -> str:
        """The first of the dropped rows, for a message."""
        return listed(self.empty_rows) + (" and others" if self.empty > len(self.empty_rows) else "")


def summarize(
    tokens: Tokens,
    rows: NDArray[np.int64],
    max_length: int,
    place: Callable[[int], str],
    where: Callable[[int], str],
) -> Summary:
    """The summary of some rows; `place` says where a row stands in its split, `where` also names its file."""
    kept = tokens.kept()[rows]
    empty = rows[~kept]
    return Summary(
        rows=len(rows),
        kept=int(kept.sum()),
        truncated=int((tokens.lengths[rows] > max_length).sum()),
        empty=len(empty),
        empty_rows=[place(int(row)) for row in empty[:_NAMED]],
        tokens=int(np.diff(tokens.offsets)[rows[kept]].sum()),
        label_tokens=int(tokens.label_counts()[rows[kept]].sum()),
        longest=int(tokens.lengths[rows].max(initial=0)),
        longest_row=_first_longest(tokens.lengths, rows, where),
        largest_token=max(int(part.max(initial=-1)) for part in (tokens.input_ids, tokens.targets) if part is not None),
        **_of_targets(tokens, rows, where),
    )


def _first_longest(lengths: NDArray[np.int32], rows: NDArray[np.int64], where: Callable[[int], str]) -> str:
    return where(int(rows[lengths[rows].argmax()])) if len(rows) else ""


def _of_targets(tokens: Tokens, rows: NDArray[np.int64], where: Callable[[int], str]) -> dict[str, Any]:
    if tokens.target_lengths is None or tokens.target_offsets is None:
        return {}
    whole, cut = tokens.target_lengths[rows], np.diff(tokens.target_offsets)[rows]
    return {
        "truncated_targets": int((whole > cut).sum()),
        "longest_target": int(whole.max(initial=0)),
        "longest_target_row": _first_longest(tokens.target_lengths, rows, where),
    }
