"""Which rows make the batches of an epoch: in every process its share, from any batch on, whatever else is random."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset, DistributedSampler, SequentialSampler

from peftlight.data.tokens import IGNORED


class Place(NamedTuple):
    """One row in the order of an epoch."""

    row: int
    """Its place in the data set."""
    seed: tuple[int, int]
    """The order's seed and the epoch: with the index, what is random about the row this time."""
    counted: bool
    """False: it only fills up a batch, where another process has one row more."""


class EpochSampler(DistributedSampler[Place]):
    """The rows of one process: the order of an epoch is a function of seed and epoch alone, and may begin later.

    Process r of P takes every P-th row of the order from the r-th on. So batch t holds the same rows in all processes
    together, however a global batch is divided over processes, also the last and incomplete one. Every process has the
    same number of rows: where they do not go round, the first rows are there again and do not count.
    """

    def __init__(
        self, rows: int, seed: Callable[[], int], shuffle: bool, share: Mapping[str, int] | None = None
    ) -> None:
        """
        Args:
            rows: how many rows the data set has.
            seed: gives that of the orders of all epochs; a checkpoint may bring another one yet.
            shuffle: whether each epoch has an order of its own.
            share: `num_replicas`, the number of processes, and `rank`; none: those of the process group, if any.
        """
        self.rows, self.order_seed, self.shuffle, self.share = rows, seed, shuffle, share
        self.epoch = self._first = 0

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes; another one than before begins with its first row."""
        if epoch != self.epoch:
            self.epoch, self._first = epoch, 0

    def begin(self, epoch: int, row: int) -> None:
        """Let this epoch begin after as many of this process's rows."""
        self.epoch, self._first = epoch, row

    def __len__(self) -> int:
        """Rows of this process in a whole epoch."""
        return -(-self.rows // self._processes()[0])

    def __iter__(self) -> Iterator[Place]:
        processes, rank = self._processes()
        seed = (self.order_seed(), self.epoch)
        order = np.random.default_rng(seed).permutation(self.rows) if self.shuffle else None
        for place in range(self._first * processes + rank, len(self) * processes, processes):
            row = place % self.rows
            yield Place(row if order is None else int(order[row]), seed, place < self.rows)

    def _processes(self) -> tuple[int, int]:
        """How many there are, and which is this one; asked for late, for a process group may come late."""
        if self.share is not None:
            return self.share["num_replicas"], self.share["rank"]
        return (dist.get_world_size(), dist.get_rank()) if dist.is_available() and dist.is_initialized() else (1, 0)


class InOrder(EpochSampler, SequentialSampler):  # type: ignore[misc]
    """The same for rows in the order of the data set, by which Lightning knows that nothing is shuffled."""


class Sampled(Dataset[dict[str, Any]]):
    """The rows of a data set by their place in an epoch, which decides what is random about them."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, place: Place | int) -> dict[str, Any]:
        if isinstance(place, int):  # a look at one row, outside of any epoch
            row: dict[str, Any] = self.dataset[place]
            return row
        before = torch.get_rng_state()
        torch.default_generator.manual_seed(_mixed(*place.seed, place.row))  # of the CPU alone
        try:
            item = self.dataset[place.row]
        finally:
            torch.set_rng_state(before)
        return item if place.counted else _uncounted(item)


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _uncounted(item: Mapping[str, Any]) -> dict[str, Any]:
    """The row without anything to learn from it or to score."""
    if "labels" not in item:
        return dict(item)
    labels = item["labels"]
    return {**item, "labels": IGNORED if isinstance(labels, int) else np.full_like(labels, IGNORED)}
