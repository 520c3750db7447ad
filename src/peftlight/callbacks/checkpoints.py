"""The checkpoints that a run keeps if nothing else is asked for."""

import os
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from peftlight.callbacks.wishes import Wishes
from peftlight.files import clear_unfinished


class Checkpoints(ModelCheckpoint):
    """Keeps the newest checkpoint, last.ckpt, and the one before it, previous.ckpt.

    One is written at the end of each epoch, and within long ones every few minutes. At every moment there is a whole
    one on the disk.
    """

    def __init__(self, dirpath: str | Path | None = None, minutes: float = 10.0) -> None:
        """
        Args:
            dirpath: folder of the files; by default checkpoints/ in the trainer's folder.
            minutes: time between checkpoints within an epoch.
        """
        super().__init__(dirpath, save_last=True, save_top_k=0, train_time_interval=timedelta(minutes=minutes))
        self.minutes = minutes
        self._step = 0
        self._since = time.monotonic()
        self._wishes = Wishes()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            clear_unfinished(self._folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._since = trainer.global_step, time.monotonic()
        self._wishes.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        if self._wishes.exchange(time.monotonic() - self._since > 60 * self.minutes):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: the time for a checkpoint comes with the training's batches."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wishes.stop()

    def state_dict(self) -> dict[str, Any]:
        """Nothing that a training which goes on would have to know."""
        return {}

    def save(self, trainer: Trainer) -> Path:
        """Write a checkpoint and return its path; all processes come here together."""
        last, new = self._folder / "last.ckpt", self._folder / "new.ckpt"
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return last
        self._since = time.monotonic()
        self._wishes.forget()  # this is what was wished for
        self.best_model_path = self.last_model_path = str(last)
        trainer.save_checkpoint(new, weights_only=False)  # whole on the disk before any other is touched
        if trainer.is_global_zero:
            if last.exists():
                os.replace(last, self._folder / "previous.ckpt")
            os.replace(new, last)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
        return last

    @property
    def _folder(self) -> Path:
        assert self.dirpath is not None
        return Path(self.dirpath)
