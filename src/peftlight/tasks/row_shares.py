"""A user's own loaders on several processes: Lightning shares out their rows, and would have some there twice."""

import math
from collections.abc import Iterator
from typing import Any

from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

_EVALUATIONS = (RunningStage.VALIDATING, RunningStage.SANITY_CHECKING, RunningStage.TESTING)


class OnceEach(DistributedSampler[Any]):
    """Every process has its share of the rows, each row once; and all have as many batches.

    Process r of P takes every P-th row from the r-th on. Where another process has one batch more, a batch of the first
    row alone is added, for processes wait for each other in a batch; it does not count.
    """

    def __init__(self, order: Any, batch_size: int, drop_last: bool, num_replicas: int, rank: int) -> None:
        """
        Args:
            order: the loader's own sampler, which gives the rows of all processes.
            batch_size: rows in a batch of one process.
            drop_last: whether an incomplete batch is left out.
            num_replicas: the number of processes.
            rank: which this one is.
        """
        self.order, self.epoch, self.num_replicas, self.rank = order, 0, num_replicas, rank
        batches = math.floor if drop_last else math.ceil
        rows = len(range(rank, len(order), num_replicas))
        own, most = batches(rows / batch_size), batches(math.ceil(len(order) / num_replicas) / batch_size)
        self.filling = own if own < most else -1
        """The number of the batch that does not count; -1: all do."""
        self._rows, self._added = rows, (batch_size if drop_last else 1) if own < most else 0
        self._kept = own * batch_size if drop_last else rows

    def __len__(self) -> int:
        return self._kept + self._added

    def __iter__(self) -> Iterator[Any]:
        order = list(self.order)
        yield from order[self.rank :: self.num_replicas][: self._kept]
        yield from order[:1] * self._added

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.order, "set_epoch"):
            self.order.set_epoch(epoch)


def share_rows_once(trainer: Any) -> None:
    """Have each row of a loader to evaluate on counted once, whoever made the loader; what is there twice is told.

    Private, but Lightning decides on the sampler nowhere else.
    """
    connector = trainer._data_connector
    if not hasattr(connector, "_shares_rows_once"):
        connector._shares_rows_once = True
        connector._resolve_sampler = _Resolver(trainer, connector._resolve_sampler)


class _Resolver:
    """In place of the connector's method."""

    def __init__(self, trainer: Any, before: Any) -> None:
        self._trainer, self._before = trainer, before
        self._told: set[str] = set()

    def __call__(self, dataloader: DataLoader[Any], shuffle: bool, mode: RunningStage | None = None) -> Any:
        trainer = self._trainer
        if not trainer._data_connector._requires_distributed_sampler(dataloader) or mode == RunningStage.PREDICTING:
            return self._before(dataloader, shuffle=shuffle, mode=mode)
        share, batches = trainer.distributed_sampler_kwargs, dataloader.batch_sampler
        if mode in _EVALUATIONS and type(batches) is BatchSampler:
            order: Any = dataloader.sampler
            if isinstance(order, RandomSampler):  # which each process would draw with random numbers of its own
                order = SequentialSampler(dataloader.dataset)  # type: ignore[arg-type]
            return OnceEach(order, batches.batch_size, batches.drop_last, share["num_replicas"], share["rank"])
        found = self._before(dataloader, shuffle=shuffle, mode=mode)
        self._tell(found, str(mode and mode.dataloader_prefix))
        return found

    def _tell(self, sampler: Any, role: str) -> None:
        rows, processes = len(sampler.dataset), sampler.num_replicas
        twice = len(sampler) * processes - rows
        if twice > 0 and role not in self._told:
            self._told.add(role)
            rank_zero_info(
                f"{role}: {rows} rows do not go round {processes} processes, so {twice} of them are there twice in "
                "each epoch"
            )


def is_filling(loaders: Any, loader: int, batch: int) -> bool:
    """Whether a batch of one of the evaluation's loaders does not count."""
    every = list(loaders.values()) if isinstance(loaders, dict) else loaders
    every = every if isinstance(every, list | tuple) else [every]
    sampler = getattr(every[loader], "sampler", None) if loader < len(every) else None
    return isinstance(sampler, OnceEach) and sampler.filling == batch
