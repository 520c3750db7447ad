"""Checkpoints and the run's record on several processes, of which each knows something else."""

import atexit
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from models import make
from peftlight.callbacks import Checkpoints, RunRecord
from peftlight.checkpoint_files import AtomicCheckpoints
from peftlight.divergence.failure import _not_finite_anywhere
from peftlight.signals import StoppedTogether
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from processes.worlds import spawn
from tasks.small import batches, class_rows, constant, loader, quiet_trainer


class Noted(Checkpoints):
    """Notes the steps of its checkpoints; on the second process ten minutes are over in the third step."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.global_rank, trainer.global_step) == (1, 2):
            self._since -= 601

    def save(self, trainer: Trainer) -> Path:
        self.steps.append(trainer.global_step)
        return super().save(trainer)


class Logging(Callback):
    """A metric of the epoch, which the processes reduce together once somebody reads it."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.log("rank", float(trainer.global_rank), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)


def one_process(rank: int, processes: int, folder: Path) -> None:
    checkpoints, record = Noted(folder / "kept"), RunRecord(folder / "run", "", ["fit"], seed=7)
    module = SequenceClassification(make("bert"), LoRA(rank=2), num_labels=3, lr_scheduler=constant)
    trainer = quiet_trainer(
        folder, [record, checkpoints, Logging()], devices=processes, strategy="ddp", use_distributed_sampler=False,
        enable_checkpointing=True, plugins=[AtomicCheckpoints()],
    )  # fmt: skip
    trainer.fit(module, loader(batches(class_rows([4] * 7, [0, 1, 2, 0, 1, 2, 0]), 1)))
    assert checkpoints.steps == [4, 7], "the others hear of it a step later, and the epoch's end is after seven"
    part = {"base": torch.tensor([1.0, torch.inf if rank == 1 else 2.0]), "other": torch.ones(2)}
    assert _not_finite_anywhere(part) == ["base"]


class Ends(Callback):
    """As a signal does: all processes leave at the same step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            raise StoppedTogether(signal.SIGTERM)


def stopped_process(rank: int, processes: int, folder: Path) -> None:
    record = RunRecord(folder / "run", "", ["fit"], seed=7)
    module = SequenceClassification(make("bert"), LoRA(rank=2), num_labels=3, lr_scheduler=constant)
    trainer = quiet_trainer(
        folder, [record, Logging(), Ends()], devices=processes, strategy="ddp", use_distributed_sampler=False
    )
    with pytest.raises(StoppedTogether):
        trainer.fit(module, loader(batches(class_rows([4] * 7, [0, 1, 2, 0, 1, 2, 0]), 1)))


def ending_process(rank: int, processes: int, folder: Path) -> None:
    module = SequenceClassification(make("bert"), LoRA(rank=2), num_labels=3, lr_scheduler=constant)
    trainer = quiet_trainer(folder, [], devices=processes, strategy="ddp", use_distributed_sampler=False)
    atexit.register(lambda: (folder / f"{rank}.txt").write_text(str(dist.is_initialized())))  # the first is called last
    trainer.fit(module, loader(batches(class_rows([4] * 2, [0, 1]), 1)))
    assert dist.is_initialized()


@pytest.mark.slow
def test_the_group_ends_before_the_interpreter(tmp_path: Path) -> None:
    """Else gloo's thread, if it still holds a tensor of the last message, aborts the process."""
    spawn(ending_process, 2, tmp_path, start="spawn")
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["False", "False"]


@pytest.mark.slow
def test_they_read_metrics_together_when_they_are_stopped(tmp_path: Path) -> None:
    spawn(stopped_process, 2, tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["state"], record["steps"]) == ("interrupted", 3)
    assert "train_loss" in record["metrics"]


@pytest.mark.slow
def test_they_save_together_and_read_metrics_together(tmp_path: Path) -> None:
    spawn(one_process, 2, tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["state"] == "finished"
    assert record["metrics"]["rank"] == 0.5
