"""A small fit on the command line, with a callback of the user's that holds it, slows it down, or kills it."""

import json
import time
from pathlib import Path
from typing import Any

HOLDING = """
import os
import signal
import time
from pathlib import Path
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import DummyLogger


class Slow(DummyLogger):
    def after_save_checkpoint(self, checkpoint_callback):
        time.sleep(3)


class Hold(Callback):
    def __init__(self, where: str = "step", flushes: int = 0):
        self.where, self.flushes, self.batches = where, flushes, 0

    def state_dict(self):
        return {"batches": self.batches}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1

    def hold(self, trainer):
        Path(f"held{trainer.global_rank}").touch()
        while not Path("go").exists():
            time.sleep(0.02)

    def setup(self, trainer, pl_module, stage):
        if self.where == "setup":
            self.hold(trainer)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3 and self.where == "step":
            self.hold(trainer)
        if self.where == "every step":
            time.sleep(0.6)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.where == "validation" and batch_idx == 0:
            self.hold(trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        if self.where == "end" and trainer.current_epoch == 1 and not Path("killed").exists():
            os.fsync = self.kill_at(os.fsync)

    def kill_at(self, flush):
        def counted(file):
            self.flushes -= 1
            if self.flushes == 0:
                Path("killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            flush(file)

        return counted
"""
"""Kills at one of the moments in which a file is flushed to the disk, from the last checkpoint on."""


def command(folder: Path, encoder: Path, where: str = "step", flushes: int = 0, **more: object) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "holding.py").write_text(HOLDING)
    (folder / "rows.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"{'good' if i % 2 else 'bad'} {i}\t{i % 2}\n" for i in range(24))
    )
    options = {
        "model": "SequenceClassification", "model.strategy": "LoRA", "model.strategy.dropout": 0.2,
        "model.base_model": encoder, "data": "SST2", "data.source": "rows.tsv", "data.validation_source": "rows.tsv",
        "data.batch_size": 2, "data.cache_dir": folder / "cache", "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "trainer.num_sanity_val_steps": 0,
        **more,
        "trainer.callbacks+": "holding.Hold", "trainer.callbacks.where": where, "trainer.callbacks.flushes": flushes,
    }  # fmt: skip
    return ["fit", *(f"--{name}={value}" for name, value in options.items())]


def wait_for(*paths: Path) -> None:
    until = time.monotonic() + 300
    while not all(path.exists() for path in paths):
        assert time.monotonic() < until
        time.sleep(0.02)


def recorded(folder: Path) -> dict[str, Any]:
    (run,) = (folder / "runs").iterdir()
    return {"run": run, **json.loads((run / "run.json").read_text())}
