"""What a proof puts into the trainings that it starts."""

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor

from peftlight.merging.probes import Probes, answers
from peftlight.shards import whole
from peftlight.tasks import PEFTModule

END, ANSWERS = "end.ckpt", "answers.pt"
_ASKED = 2
"""Rows of a batch whose scores are kept: those of a language model are as many as its vocabulary for each token."""


class Witness(Callback):
    """Keeps what a proof compares in a folder, and kills the process where a proof wants it."""

    def __init__(self, folder: str, epoch: int, dropout: bool = True, kill: bool = False, ask: bool = False) -> None:
        """
        Args:
            folder: where end.ckpt and the rest go; it exists.
            epoch: optimizer steps of an epoch at most.
            dropout: whether dropout stays on.
            kill: end the process by SIGKILL in the middle of the first epoch, just after a checkpoint, and, once it is
                resumed, at the start of the second; a file in the folder says that it was done.
            ask: keep what the trained model answers to the first rows.
        """
        self.folder, self.epoch, self.dropout, self.kill, self.ask = Path(folder), epoch, dropout, kill, ask
        self._asked: dict[str, Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        trainer.limit_train_batches = self.epoch * trainer.accumulate_grad_batches

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.dropout:
            pl_module.eval()  # the one switch that every model obeys, wherever it keeps its rates

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.kill and trainer.current_epoch == 1:
            self._die(trainer, "at the start of epoch 2")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        assert isinstance(pl_module, PEFTModule)
        if self.ask and not self._asked:
            self._asked = {key: value[:_ASKED].detach().cpu() for key, value in pl_module.inputs(batch).items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        file = gradient_file(self.folder, trainer.global_rank)
        if trainer.global_step == 1 and not file.exists():
            save_file(_gradients(pl_module), file)
        done, of = batch_idx + 1, int(trainer.num_training_batches)
        if self.kill and trainer.current_epoch == 0 and done == _middle(of, trainer.accumulate_grad_batches):
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / "middle.ckpt")
            self._die(trainer, f"after {done} of {of} batches of epoch 1")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / END)
        if self.ask:
            assert isinstance(pl_module, PEFTModule)
            assert pl_module.model is not None
            kept = {"inputs": self._asked, "scores": answers(pl_module.model, Probes([self._asked]))[0]}
            torch.save(kept, self.folder / ANSWERS)

    def _die(self, trainer: Trainer, where: str) -> None:
        mark = self.folder / f"killed {where}, process {trainer.global_rank}"
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class StopAfter(Callback):
    """Ends a training after some optimizer steps, without the validation that otherwise comes at an end."""

    def __init__(self, steps: int) -> None:
        """
        Args:
            steps: after how many.
        """
        self.steps = steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step >= self.steps:
            trainer.limit_val_batches = 0
            trainer.should_stop = True


def gradient_file(folder: Path, process: int) -> Path:
    """Where a process keeps its gradients of the first step."""
    return folder / f"gradients-{process}.safetensors"


def _gradients(module: LightningModule) -> dict[str, Tensor]:
    """They are there until the next step: scaled, averaged and clipped as the optimizer got them."""
    found = {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}
    return {name: gradient.cpu().contiguous() for name, gradient in found.items()}


def _middle(batches: int, window: int) -> int:
    """How many of an epoch's batches are done in its middle, and within an accumulation window; 0: there is none."""
    half = batches // 2
    return half + 1 if window > 1 and half % window == 0 and half + 1 < batches else half
