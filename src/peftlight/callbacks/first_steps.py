"""The first optimizer steps of a run, as `peftlight replay` compares them."""

import hashlib
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from peftlight.callbacks.run_record import RunRecord

FIRST_STEPS = 20


class FirstStep(TypedDict):
    """One optimizer step as run.json holds it."""

    loss: float | None
    """The mean over all labels of the global batch, all digits of it."""
    batches: list[str]
    """The start of the sha256 of all tensors in each of its micro-batches on the first process."""


class FirstSteps(Callback):
    """Notes the loss and the batches of the first 20 steps in run.json, and on what the training began.

    To read them costs those steps a wait for the device. A training that goes on from a checkpoint without them notes
    none.
    """

    def __init__(self, record: RunRecord) -> None:
        """
        Args:
            record: writes run.json.
        """
        self.run_record = record
        self.steps: list[FirstStep] = []
        self._batches: list[str] = []
        self._written = self._unknown = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unknown = len(self.steps) < min(trainer.global_step, FIRST_STEPS)  # the checkpoint does not hold them
        if trainer.is_global_zero and "device" not in self.run_record.record:
            self.run_record.note(device=_name(pl_module.device), threads=torch.get_num_threads())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._unknown or len(self.steps) == FIRST_STEPS:
            return
        self._batches.append(_digest(batch))
        if trainer.global_step > len(self.steps):
            loss = trainer.callback_metrics.get("train_loss")
            self.steps.append(FirstStep(loss=None if loss is None else float(loss), batches=self._batches))
            self._batches = []
        if len(self.steps) == FIRST_STEPS:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not (self._written or self._unknown):
            self._written = True
            self.run_record.note(first_steps=self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps, self._batches = state_dict["steps"], state_dict["batches"]


def _digest(batch: Mapping[str, Any]) -> str:
    sha = hashlib.sha256()
    for key, value in sorted(batch.items()):
        if isinstance(value, Tensor):
            sha.update(f"{key} {tuple(value.shape)} {value.dtype} ".encode())
            sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:12]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} with {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type
