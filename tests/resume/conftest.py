"""A run that was killed in the middle of its second epoch, and the same run undisturbed."""

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import forked

OWN = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import Callback
from peftlight.strategies import LoRA


@dataclass
class MyLoRA(LoRA):
    def uses(self, hook):
        return hook == "prepare" or super().uses(hook)

    def prepare(self, adapter, material):
        with open("prepared", "a") as file:
            print(len(list(material.batches())), file=file)


class KilledOnce(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 7 and Path("kill").exists():
            Path("kill").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        while Path("hold").exists():
            Path("held").touch()
            time.sleep(0.05)
"""


def config(encoder: Path) -> dict[str, Any]:
    saving = {"class_path": "peftlight.callbacks.Checkpoints", "init_args": {"minutes": 0}}
    return {
        "model": {
            "class_path": "SequenceClassification",
            "init_args": {
                "base_model": str(encoder),
                "strategy": {"class_path": "mine.MyLoRA", "init_args": {"rank": 2, "dropout": 0.2}},
            },
        },
        "data": {"class_path": "SST2", "init_args": {"source": "rows.jsonl", "batch_size": 4, "validation_size": 8}},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.01}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "limit_train_batches": 6,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "mine.KilledOnce"}, saving],
        },
    }


def only_run(folder: Path) -> Path:
    (run,) = (folder / "runs").iterdir()
    return run


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without the column that depends on the time."""
    with open(run / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in csv.DictReader(file)]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Callable[[], Path]:
    """Makes a folder with rows, a module of the user's, and run.yaml."""

    def made() -> Path:
        folder = tmp_path_factory.mktemp("work")
        rows = [f'{{"sentence": "word {number * 7 % 13} again", "label": {number % 2}}}' for number in range(32)]
        (folder / "rows.jsonl").write_text("\n".join(rows))
        (folder / "mine.py").write_text(OWN)
        (folder / "run.yaml").write_text(yaml.safe_dump(config(encoder)))
        return folder

    return made


@pytest.fixture(scope="session")
def undisturbed(fresh: Callable[[], Path]) -> Path:
    folder = fresh()
    code, said = forked.peftlight(["fit", "--config", "run.yaml"], folder)
    assert code == 0, said
    return folder


@pytest.fixture(scope="session")
def killed_once(fresh: Callable[[], Path]) -> Path:
    folder = fresh()
    (folder / "kill").touch()
    code, said = forked.peftlight(["fit", "--config", "run.yaml"], folder)
    assert code == -9, said
    return folder


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of its own."""
    return Path(shutil.copytree(killed_once, tmp_path / "work"))


@pytest.fixture
def finished(undisturbed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "work"))
