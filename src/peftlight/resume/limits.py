"""To which of its limits a training has come."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

TIME, PATIENCE = "trainer.max_time", "EarlyStopping"
COUNTS = ("trainer.max_steps", "trainer.max_epochs")


@dataclass(frozen=True)
class Done:
    """What a training had done."""

    steps: int = 0
    """Optimizer steps."""
    epochs: int = 0
    """Whole ones."""
    timer: dict[str, Any] = field(default_factory=dict)
    """The state of the trainer's timer, which counts over all resumes; empty without a limit of time."""
    out_of_patience: bool = False
    """Whether early stopping ended it."""


def done_in(checkpoint: Mapping[str, Any]) -> Done:
    """What had been done when a checkpoint was written."""
    epochs = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    progress, callbacks = checkpoint.get("progress"), checkpoint.get("callbacks", {})
    watching = [state for name, state in callbacks.items() if name.startswith(PATIENCE)]
    return Done(
        steps=int(checkpoint.get("global_step", 0)),
        # Lightning counts an epoch that a limit broke off as a whole one
        epochs=epochs.get("started", 0) - progress["in_epoch"] if progress else epochs.get("processed", 0),
        timer=callbacks.get("Timer", {}),
        out_of_patience=any(state["wait_count"] >= state["patience"] for state in watching),
    )


def reached(done: Done, config: Mapping[str, Any]) -> list[str]:
    """The names of the limits in `config`, a resolved configuration, behind which nothing is left to train."""
    return list(_reached(done, config["trainer"]))


def _reached(done: Done, trainer: Mapping[str, Any]) -> Iterator[str]:
    for name, count in (("max_steps", done.steps), ("max_epochs", done.epochs)):
        limit = trainer.get(name)
        if limit is not None and 0 <= limit <= count:
            yield f"trainer.{name}"
    if done.timer and trainer.get("max_time"):
        with suppress(MisconfigurationException):  # the trainer says what is wrong with it
            timer = Timer(trainer["max_time"])
            timer.load_state_dict(done.timer)
            if (timer.time_remaining() or 0) <= 0:
                yield TIME
    if done.out_of_patience and PATIENCE in str(trainer.get("callbacks")):
        yield PATIENCE
