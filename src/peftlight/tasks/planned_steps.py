"""How many optimizer steps a training will have, as far as that is known; asked again, it follows what has happened."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from peftlight.errors import UserError


def planned_steps(trainer: Trainer) -> float | None:
    """The optimizer steps of the whole training: those done, and those that are left by its limits.

    Lightning's own estimate takes the accumulation of the moment for that of all epochs, takes the batches of the
    moment for those of the epochs before, and gives -1 where only `max_epochs` limits data without a length.

    Returns:
        the steps; infinity for a training without an end; None where the training ends with the data, whose length is
        not known.
    """
    most = math.inf if trainer.max_steps == -1 else trainer.max_steps
    epochs = trainer.max_epochs
    if epochs is None or epochs == -1:
        return most
    epoch = _Epoch.of(trainer)
    if epoch.batches == math.inf:
        return None if most == math.inf else most
    done, begun = _epochs_done(trainer), _batches_done(trainer)
    left = epoch.steps_of(trainer, range(done, max(epochs, 1)))
    if begun:
        factor = accumulation(trainer, done)
        left -= epoch.steps(factor) if begun >= epoch.batches else begun // factor
    return min(trainer.global_step + max(left, 0), most)


def known_steps(trainer: Trainer, strategy: str | None) -> int:
    """The optimizer steps of the whole training, which something plans by.

    Args:
        trainer: of the training.
        strategy: the name of the strategy, where it is what plans; None: a schedule does.

    Raises:
        UserError: the number is not known.
    """
    steps = planned_steps(trainer)
    if steps is not None and steps != math.inf:
        return int(steps)
    beginning = f"The number of steps is not known, but {strategy or 'LinearWarmup'} plans by it: "
    other = "." if strategy else ", or choose another --lr_scheduler, such as ConstantLR."
    if steps is None:
        raise UserError(
            f"{beginning}the training data has no length (its loader or data set has no __len__), so it is not known "
            "how many batches an epoch of --trainer.max_epochs has. Set --trainer.max_steps, or "
            f"--trainer.limit_train_batches to a whole number of batches in an epoch{other}"
        )
    raise UserError(f"{beginning}set --trainer.max_epochs or --trainer.max_steps{other}")


@dataclass(frozen=True)
class _Epoch:
    """An epoch to come."""

    batches: float
    ends_unseen: bool = False
    """Whether its data end before a limit, unseen by Lightning, which then leaves an open accumulation open."""

    @classmethod
    def of(cls, trainer: Trainer) -> "_Epoch":
        """Where a limit lay beyond the end of data without a length, it is as those that have been."""
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        batches, epochs = trainer.num_training_batches, _epochs_done(trainer)
        if epochs == 0 or batches == math.inf or sized_len(trainer.train_dataloader) is not None:
            return cls(batches)
        total: Any = trainer.fit_loop.epoch_loop.batch_progress.total
        seen = math.ceil((total.processed - _batches_done(trainer)) / epochs)
        return cls(seen, ends_unseen=True) if seen < batches else cls(batches)

    def steps(self, factor: int) -> int:
        """Optimizer steps, where so many batches make one."""
        return math.floor(self.batches / factor) if self.ends_unseen else math.ceil(self.batches / factor)

    def steps_of(self, trainer: Trainer, epochs: range) -> int:
        """Those of several such epochs."""
        changes = [epoch for each in _schedulers(trainer) for epoch in each.epochs if epoch in epochs]
        starts = sorted({*epochs[:1], *changes})
        spans = zip(starts, [*starts[1:], epochs.stop], strict=False)  # both are empty where no epoch is left
        return sum((end - start) * self.steps(accumulation(trainer, start)) for start, end in spans)


def accumulation(trainer: Trainer, epoch: int) -> int:
    """How many batches make an optimizer step in an epoch, counted from 0."""
    for callback in _schedulers(trainer):
        return callback.get_accumulate_grad_batches(epoch)
    return trainer.accumulate_grad_batches


def accumulations(trainer: Trainer) -> list[int]:
    """All those of the training, in their order."""
    for callback in _schedulers(trainer):
        return list(dict.fromkeys(callback.get_accumulate_grad_batches(epoch) for epoch in callback.epochs))
    return [trainer.accumulate_grad_batches]


def _schedulers(trainer: Any) -> Iterator[GradientAccumulationScheduler]:
    yield from (each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler))


def _epochs_done(trainer: Trainer) -> int:
    progress: Any = trainer.fit_loop.epoch_progress.current
    return int(progress.processed)


def _batches_done(trainer: Trainer) -> int:
    """Those of the epoch that is begun; 0 between two epochs, where Lightning still counts those of the one before."""
    epoch: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    return int(batches.processed) if epoch.started > epoch.processed else 0
