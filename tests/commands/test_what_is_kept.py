"""On the command line: the record of a run has the figures that `evaluate` finds for its adapter."""

import json
from pathlib import Path

import pytest
import torch

from commands.trained import COMMAND_LINE, fitted, metrics_of
from peftlight.cli import main
from peftlight.interop import read_record

pytestmark = COMMAND_LINE

ENDER = """
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning


class Ender(Callback):
    def on_train_end(self, trainer, pl_module):
        for name, parameter in pl_module.named_parameters():
            if name.endswith("classifier.bias"):
                parameter.data.copy_(parameter.data.new_tensor([0.0, 2.0]))


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.bert.encoder.layer[1].output, optimizer, lr=0.01)
"""
EMA = {"trainer.callbacks+": "EMAWeightAveraging", "trainer.callbacks.decay": 0.8}


@pytest.fixture(autouse=True)
def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "users_ender.py").write_text(ENDER)
    monkeypatch.syspath_prepend(str(tmp_path))


def evaluated(run: Path, folder: Path) -> dict[str, float]:
    file = folder / "figures.json"
    assert main(["evaluate", "--traceback", str(run), "--json", str(file)]) == 0
    found: dict[str, float] = json.loads(file.read_text())["rows"][-1]["metrics"]
    return found


CASES: dict[str, dict[str, object]] = {
    "a callback of the user's, below an epoch": {
        "trainer.callbacks+": "users_ender.Ender", "trainer.max_steps": 2, "trainer.limit_train_batches": 1.0,
    },
    "an average": EMA,
    "unfrozen in mid-run": {"trainer.callbacks+": "users_ender.Unfreeze", "trainer.max_epochs": 2},
    "a time limit": {"trainer.max_time": "00:00:00:00"},
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_record_says_what_evaluate_finds(tmp_path: Path, encoder: Path, name: str) -> None:
    run = fitted(tmp_path / "runs", encoder, "lora", data__source="sample:sentiment", **CASES[name])
    expected = evaluated(run, tmp_path)
    beside = read_record(run / "adapter").metrics
    assert beside is not None
    assert len(expected) > 1
    for metric, value in expected.items():
        assert metrics_of(run)[metric] == pytest.approx(value, abs=1e-6), metric
        assert beside[f"val_{metric}"] == pytest.approx(value, abs=1e-6), metric


@pytest.mark.slow
@pytest.mark.parametrize("name", ["an average", "unfrozen in mid-run"])
def test_a_run_that_goes_on_comes_to_the_same(tmp_path: Path, encoder: Path, name: str) -> None:
    options = {**CASES[name], "data.source": "sample:sentiment", "lr_scheduler": "ConstantLR",
               "lr_scheduler.factor": 1.0}  # fmt: skip
    whole = fitted(tmp_path / "whole", encoder, "lora", **{**options, "trainer.max_epochs": 3})
    part = fitted(tmp_path / "part", encoder, "lora", **{**options, "trainer.max_epochs": 2})
    more = ["--trainer.max_epochs=3", "--allow_changes", "trainer.max_epochs"]
    assert main(["fit", "--traceback", "--resume", str(part), *more]) == 0
    one, other = (torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, part))
    for key, value in one["state_dict"].items():
        assert torch.equal(other["state_dict"][key], value), key
    files = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, part)]
    assert files[0] == files[1]
