"""The callback that ends a training before a step that would spoil it, and one that learns nothing."""

import math
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from peftlight.divergence.failure import failure
from peftlight.divergence.micro_batch import MicroBatch
from peftlight.divergence.step import Failure, Step
from peftlight.errors import UserError, listed

_LEARNED = 0.1
"""A loss that was once below this before it became 0 has fallen there: the rows are learned by heart."""
_REMEMBERED = 6
"""Steps whose losses and gradients a message tells."""


class Guard(Callback):
    """Stops a training whose loss or gradient is not finite, before the step, or that goes on without learning.

    It is part of every training of peftlight; one given to the Trainer takes its place. Weights and optimizer stay as
    after the step before, and nothing of the failed one gets into a checkpoint. Four numbers are read from the device
    before each optimizer step, which waits for its backward pass; the step's micro-batches stay in memory until the
    next.
    """

    def __init__(self, skipped_steps: int = 20, idle_steps: int = 10) -> None:
        """
        Args:
            skipped_steps: steps in a row that 16-mixed may skip while it looks for a scale; each halves it.
            idle_steps: steps in a row whose loss or gradient may be exactly 0, or that may have no label.
        """
        for name, value in (("skipped_steps", skipped_steps), ("idle_steps", idle_steps)):
            if value < 1:
                raise UserError(f"Guard's {name} is at least 1; got {value}.")
        self.skipped_steps, self.idle_steps = skipped_steps, idle_steps
        self._window: list[MicroBatch] = []
        self._start()

    def _start(self) -> None:
        self._window.clear()
        self._judged = False
        self._steps: deque[Step] = deque(maxlen=_REMEMBERED)
        self._skipped = self._idle = 0
        self._lowest_loss = math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped, "idle": self._idle, "lowest_loss": self._lowest_loss}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._idle = state_dict["skipped"], state_dict["idle"]
        self._lowest_loss = state_dict["lowest_loss"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._judged:  # not sooner: some optimizers compute a step's loss several times
            self._window.clear()
            self._judged = False
        self._window.append(MicroBatch(batch, pl_module.device))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._window[-1].loss = loss.detach()

    def judge(self, task: Any, rate: float, loss: Tensor, labels: Tensor, gradient: Tensor, penalty: Tensor) -> None:
        """Decide whether the optimizer step that comes next may be taken.

        All processes decide alike, as they are given the same numbers.

        Args:
            task: see `Task` in `peftlight.divergence.evidence`.
            rate: the learning rate.
            loss: the mean per label over all micro-batches and processes; all of these are scalars.
            labels: how many there were.
            gradient: the largest absolute value in the loss's gradient.
            penalty: the largest absolute value in the gradient of the strategy's penalty.

        Raises:
            UserError: it may not.
        """
        numbers = torch.stack([loss, labels, gradient, penalty]).tolist()  # waits for the device, once
        step = Step(task.trainer.global_step + 1, rate, *numbers)
        self._steps.append(step)
        if found := self._found(step, task.trainer):
            raise UserError(failure(task, self._window, found, list(self._steps)))
        self._judged = True

    def _found(self, step: Step, trainer: Trainer) -> Failure | None:
        bad = step.not_finite()
        skips = bad == "gradient" and getattr(trainer.precision_plugin, "scaler", None) is not None
        if bad and not skips:
            return bad
        self._skipped = self._skipped + 1 if skips else 0
        if skips:  # as 16-mixed does on its way to a scale that works
            return "skipped" if self._skipped >= self.skipped_steps else None
        return self._found_idle(step)

    def _found_idle(self, step: Step) -> Failure | None:
        nothing = step.idle()
        if nothing is None:
            self._idle, self._lowest_loss = 0, min(self._lowest_loss, step.loss)
            return None
        self._idle += 1
        if nothing == "no labels" and self._idle == 1:
            rows = [row for micro in self._window for row in micro.rows()]
            rank_zero_warn(f"Step {step.number} has no label in any of its rows ({listed(rows)}): it teaches nothing.")
        if self._idle < self.idle_steps:
            return None
        if nothing != "no loss" or self._lowest_loss > _LEARNED:
            return nothing
        if self._idle == self.idle_steps:
            rank_zero_warn(f"The loss has been exactly 0 for {self._idle} steps: these rows are learned by heart.")
        return None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None and not torch.as_tensor(loss).isfinite():
            rank_zero_warn(f"The validation loss is {float(loss)} after step {trainer.global_step}.")
