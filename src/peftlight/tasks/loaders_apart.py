"""Several loaders in one evaluation: metrics of all rows together, and of each loader apart."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_sum

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule

State = dict[str, Any]


class LoadersApart:
    """Takes what a task's metrics have counted after each loader, and reports the differences.

    A task counts on over all loaders, so that what it reports at the end, which is what is monitored, is of all rows.
    """

    def __init__(self, module: "PEFTModule") -> None:
        self._module = module
        self.suffix = ""
        """Added to the names of what is logged now."""
        self._ends: dict[int, dict[str, State]] = {}
        self._current = 0

    def start(self) -> None:
        """An evaluation begins."""
        self._ends, self._current = {}, 0

    def meet(self, loader: int) -> None:
        """A batch of this loader comes, after all of those before it."""
        if loader != self._current:
            self._ends[self._current] = self._states()
            self._current = loader

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Within the block copies of the task's metrics count, and are forgotten."""
        originals = dict(self._metrics())
        for name, metric in originals.items():
            _put(self._module, name, copy.deepcopy(metric))
        try:
            yield
        finally:
            for name, metric in originals.items():
                _put(self._module, name, metric)

    def report(self, stage: str) -> None:
        """Log the metrics of each loader, if there are several, as Lightning calls them; and then those of all."""
        module, count = self._module, self._count(stage)
        if count > 1:
            self._ends[self._current] = self._states()
            before: dict[str, State] = {}
            for loader in range(count):
                now = self._ends.get(loader, before)  # a loader without rows has added nothing
                with self._counting(before, now) as told:
                    if told:
                        self.suffix = f"/dataloader_idx_{loader}"
                        module.report(stage)
                        self.suffix = ""
                before = now
        module.report(stage)

    def _count(self, stage: str) -> int:
        trainer = self._module.trainer
        if trainer.sanity_checking:
            return len(trainer.num_sanity_val_batches)
        return len(trainer.num_val_batches if stage == "val" else trainer.num_test_batches)

    def _metrics(self) -> Iterator[tuple[str, Metric]]:
        yield from ((name, each) for name, each in self._module.named_modules() if isinstance(each, Metric))

    def _states(self) -> dict[str, State]:
        return {name: {key: _kept(value) for key, value in metric.metric_state.items()}
                for name, metric in self._metrics()}  # fmt: skip

    @contextmanager
    def _counting(self, before: dict[str, State], now: dict[str, State]) -> Iterator[bool]:
        """Within the block the task's metrics have counted what came between two moments; False: one cannot tell."""
        originals = dict(self._metrics())
        if strange := sorted({type(each).__name__ for each in originals.values() if not _adds_up(each)}):
            rank_zero_warn(f"Metrics are logged of all loaders together alone: what {', '.join(strange)} keeps cannot "
                           "be divided among them.")  # fmt: skip
            yield False
            return
        for name, metric in originals.items():
            part = copy.deepcopy(metric)
            for key, value in now.get(name, metric.metric_state).items():
                setattr(part, key, _difference(value, before.get(name, {}).get(key)))
            _put(self._module, name, part)
        try:
            yield True
        finally:
            for name, metric in originals.items():
                _put(self._module, name, metric)


def _adds_up(metric: Metric) -> bool:
    """Whether what it keeps of some rows and of others is added up, or stands in one list; torchmetrics says so only
    privately."""
    return all(reduction in (dim_zero_sum, dim_zero_cat) for reduction in metric._reductions.values())


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else list(value)


def _difference(now: Any, before: Any) -> Any:
    if before is None:
        return _kept(now)
    return now - before.to(now.device) if isinstance(now, Tensor) else list(now[len(before) :])


def _put(module: nn.Module, name: str, metric: Metric) -> None:
    place, _, last = name.rpartition(".")
    holder: Any = module.get_submodule(place)
    setattr(holder, last, metric)
