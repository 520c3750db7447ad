"""Progress: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from peftlight.console import say
from peftlight.tasks.planned_steps import planned_steps

_SECONDS_BETWEEN_LINES = 10.0


class Progress(RichProgressBar):
    """A bar with loss, learning rate, tokens per second and the time left; without a terminal, a line now and then."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._last_line = self._start = time.monotonic()
        self._first_step = 0
        if not sys.stdout.isatty():
            self.disable()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {name: _short(name, value) for name, value in metrics.items() if not isinstance(value, dict)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._last_line = self._start = time.monotonic()
        self._first_step = trainer.global_step  # not 0 in a run that goes on from a checkpoint

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.is_disabled and time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._line(trainer, trainer.progress_bar_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        if self.is_disabled and not trainer.sanity_checking and trainer.state.fn == "fit":
            self._line(trainer, trainer.progress_bar_metrics)

    @rank_zero_only
    def _line(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        now = time.monotonic()
        done, total = trainer.global_step, planned_steps(trainer)
        shown = [f"{name} {_short(name, value)}" for name, value in metrics.items()]
        if total is None or total == float("inf"):
            say(f"step {done}: {', '.join(shown)}")
        else:
            seconds = (now - self._start) / max(1, done - self._first_step) * (total - done)
            say(f"step {done}/{total}: {', '.join([*shown, f'{seconds:.0f} s left'])}")
        self._last_line = now


def _short(name: str, value: float | str | Tensor) -> str:
    if isinstance(value, str):
        return value
    number = float(value)
    if name == "tokens_per_second":
        return f"{number:,.0f}"
    return f"{number:.2e}" if number and abs(number) < 1e-3 else f"{number:.4g}"
