"""Where Lightning's training loop stands when a checkpoint is saved, and how it goes on from just there.

A checkpoint may be saved in the middle of a batch's or an epoch's last duties. On its own Lightning then leaves out a
validation that was due, a plateau schedule's move, or counts a step twice. For this the private counters of its loops
are read and set; what is private about their loaders is in `loader_position.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

_COUNTS = ("ready", "started", "processed", "completed")


class Progress(TypedDict):
    """What Lightning's own counters do not say."""

    in_epoch: bool
    """Whether the epoch has more to do; a stop by a limit breaks it off, and it goes on."""
    validates: bool
    """Whether a validation is still to come before the next batch."""
    plateau: bool
    """Whether a schedule that watches a metric is still to move at the end of the epoch."""
    steps_logged: int
    """The step that loggers see, such that Lightning counts on rightly."""
    metrics: dict[str, Tensor]
    """What callbacks and schedules watch."""
    steps: int
    """Optimizer steps done."""


def progress_of(trainer: Trainer) -> Progress:
    """Where the loop stands; asked within a fit, at whatever moment."""
    loop, epoch = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    batch: Any = loop.batch_progress.current
    over = epoch.processed == epoch.started  # type: ignore[attr-defined]
    in_batch_end, validating = batch.processed != batch.completed, bool(trainer.validating)
    with _after_the_last_batch(trainer):
        broken_off = over and batch.ready > 0 and not loop._num_ready_batches_reached()
        in_epoch = not over or broken_off
        due = in_epoch and loop._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        step = 0 if loop._should_accumulate() else 1
    counted = not in_batch_end and not validating
    # Where a validation is due, Lightning goes once more through the end of the batch, and counts the step there.
    ahead = (0 if counted else step) - (step if due else 0)
    return {
        "in_epoch": in_epoch,
        "validates": due and (in_batch_end or (validating and not _is_validated(trainer))),
        "plateau": over and not broken_off and epoch.completed != epoch.processed,  # type: ignore[attr-defined]
        "steps_logged": loop._batches_that_stepped + (ahead if in_epoch else 0),
        "metrics": {name: value.detach().cpu() for name, value in trainer.callback_metrics.items()},
        "steps": trainer.global_step,
    }


def settle(trainer: Trainer, fit_loop: dict[str, Any], progress: Progress) -> None:
    """Bring the counters in a checkpoint to the end of what was done, so that Lightning repeats and skips nothing.

    Where nothing is left to train, it would not even end the training: it is shown one step or epoch less.
    """
    if fit_loop["epoch_progress"]["current"]["processed"] == trainer.max_epochs and not progress["in_epoch"]:
        progress["in_epoch"], progress["plateau"] = True, False
    steps = fit_loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]
    if steps["completed"] == trainer.max_steps:
        steps["completed"] -= 1
    batches = fit_loop["epoch_loop.batch_progress"]
    batches["is_last_batch"] &= batches["current"]["ready"] == batches["current"]["processed"]
    for counts in (batches["total"], batches["current"]):
        counts.update(dict.fromkeys(_COUNTS, counts["processed"]))
    for counts in (fit_loop["epoch_progress"]["total"], fit_loop["epoch_progress"]["current"]):
        begun = counts["started"]
        counts.update(dict.fromkeys(_COUNTS, begun))
        if progress["in_epoch"]:
            counts.update(processed=begun - 1, completed=begun - 1)
    fit_loop["epoch_loop.state_dict"]["_batches_that_stepped"] = progress["steps_logged"]
    if progress["validates"]:
        validated = fit_loop["epoch_loop.val_loop.batch_progress"]
        for counts in (validated["total"], validated["current"]):
            counts.update(dict.fromkeys(_COUNTS, 0))


def go_on(trainer: Trainer, progress: Progress) -> None:
    """Do what was left to do, or have Lightning do it; in `on_train_start`, when the loops' counters are back."""
    fit_loop = trainer.fit_loop
    fit_loop._restarting = False  # else the end of the epoch would not move a schedule that watches a metric
    if progress["validates"]:
        fit_loop.epoch_loop.val_loop._restart_stage = "restarted_mid_evaluation"
    else:
        count_steps(trainer, progress)
    trainer.callback_metrics.update(progress["metrics"])
    if progress["plateau"]:
        fit_loop.epoch_loop.update_lr_schedulers("epoch", update_plateau_schedulers=True)
    if any(isinstance(call, EarlyStopping) and call.wait_count >= call.patience for call in trainer.callbacks):  # type: ignore[attr-defined]
        trainer.should_stop = True


def validate(trainer: Trainer) -> None:
    """Run a validation when the last step is done, logged as of it; the loops stand where they stood."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    _ = trainer.callback_metrics  # so that those of the training are counted in
    first = connector._first_loop_iter
    loop.val_loop.restarting = False
    trainer.validating = True
    connector.reset_results()  # a validation may have been broken off
    try:
        with _in_the_last_step(trainer, -1):
            loop.val_loop.run()
    finally:
        trainer.training = True
        connector._first_loop_iter = first


@contextmanager
def as_before_validate(trainer: Trainer) -> Iterator[None]:
    """Within the block, which lies within `validate`, the loops say what they said before it."""
    trainer.training = True
    with _in_the_last_step(trainer, 1):
        yield
    trainer.validating = True


@contextmanager
def _in_the_last_step(trainer: Trainer, ahead: int) -> Iterator[None]:
    """Within the block what is logged has the number of the last step, and its epoch; Lightning has counted on."""
    loop, epoch = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress.current
    stepped, completed = loop._batches_that_stepped, epoch.completed
    loop._batches_that_stepped += ahead
    epoch.completed = max(0, epoch.started - 1) if ahead < 0 else epoch.processed  # type: ignore[attr-defined]
    try:
        yield
    finally:
        loop._batches_that_stepped, epoch.completed = stepped, completed


def count_steps(trainer: Trainer, progress: Progress) -> None:
    """Show Lightning all steps again; a validation that was still to come has to have begun."""
    trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = progress["steps"]


@contextmanager
def _after_the_last_batch(trainer: Trainer) -> Iterator[None]:
    """Within the block the counters are as they were after the last batch done, in a training that does not stop."""
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    ready, last, stops = progress.current.ready, progress.is_last_batch, trainer.should_stop
    ahead = ready - progress.current.processed
    try:
        progress.current.ready, progress.total.ready = ready - ahead, progress.total.ready - ahead
        progress.is_last_batch, trainer.should_stop = last and not ahead, False
        yield
    finally:
        progress.current.ready, progress.total.ready = ready, progress.total.ready + ahead
        progress.is_last_batch, trainer.should_stop = last, stops


def _is_validated(trainer: Trainer) -> bool:
    done: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    return bool(done.is_last_batch) and done.current.ready == done.current.completed
