"""From rows of different lengths to one padded batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from peftlight.data.tokens import IGNORED, Item


@dataclass(frozen=True)
class Collator:
    """Pads rows to the longest of the batch; what is padding follows from positions, never from the token's id."""

    pad_id: int
    """The token that fills the gaps."""
    left: bool = False
    """Whether the gaps stand at the left, as generation needs them."""

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        rows = [item["input_ids"] for item in items]
        batch = {
            "input_ids": self._padded(rows, self.pad_id),
            "attention_mask": self._padded([np.ones_like(row) for row in rows], 0),
            "row": torch.tensor([item["row"] for item in items]),
        }
        if "labels" in items[0]:
            batch["labels"] = self._labels(items)
        if "words" in items[0]:
            batch["words"] = self._padded([item["words"] for item in items], IGNORED)
        if "token_type_ids" in items[0]:
            batch["token_type_ids"] = self._padded([item["token_type_ids"] for item in items], 0)
        return batch

    def _labels(self, items: Sequence[Item]) -> torch.Tensor:
        labels = [item["labels"] for item in items]
        if isinstance(labels[0], int):
            return torch.tensor(labels)
        return self._padded([np.asarray(row) for row in labels], IGNORED)

    def _padded(self, rows: Sequence[NDArray[np.integer]], fill: int) -> torch.Tensor:
        longest = max(len(row) for row in rows)
        padded = np.full((len(rows), longest), fill, np.int64)
        for line, row in zip(padded, rows, strict=True):
            start = longest - len(row) if self.left else 0
            line[start : start + len(row)] = row
        return torch.from_numpy(padded)
