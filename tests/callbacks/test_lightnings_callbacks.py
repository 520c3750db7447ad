"""Each callback that Lightning ships, once, on the command line: it does what it is for, or is refused by its name."""

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch import Callback, callbacks

from callbacks.commanded import command, recorded
from forked import join, start

SHIPPED = {name for name, each in vars(callbacks).items() if inspect.isclass(each) and issubclass(each, Callback)}

Run = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A callback, its options and those of the run, and what must come of it."""

    name: str
    options: dict[str, object] = field(default_factory=dict)
    run: dict[str, object] = field(default_factory=dict)
    says: str = ""
    """What the run says, in its message if it is refused."""
    refused: bool = False
    holds: Callable[[Run], bool] = lambda run: True


def _refused(name: str, says: str, **options: object) -> Case:
    return Case(name, options, says=says, refused=True)


def _config(run: Run) -> Any:
    return yaml.safe_load((run["run"] / "config.yaml").read_text())


def _metrics(run: Run) -> str:
    return (run["run"] / "metrics.csv").read_text().partition("\n")[0]


LOGGED = {"trainer.log_every_n_steps": 1}
CASES = [
    _refused("BaseFinetuning", "BaseFinetuning is the base class"),
    _refused("BasePredictionWriter", "BasePredictionWriter is the base class"),
    _refused("Callback", "Callback is the base class"),
    _refused("Checkpoint", "Checkpoint is the base class"),
    _refused("ModelPruning", "ModelPruning sets weights of the base to zero", pruning_fn="l1_unstructured"),
    Case("ProgressBar", run={"trainer.enable_progress_bar": "true"}, says="ProgressBar is the base", refused=True),
    Case("BatchSizeFinder", {"max_trials": 2}, holds=lambda run: _config(run)["data"]["init_args"]["batch_size"] == 4),
    Case("DeviceStatsMonitor", {"cpu_stats": "true"}, LOGGED, holds=lambda run: "DeviceStatsMonitor" in _metrics(run)),
    Case("EarlyStopping", {"monitor": "val_loss", "min_delta": 9, "patience": 1}, {"trainer.max_epochs": 5},
         holds=lambda run: run["steps"] == 24),
    Case("GradientAccumulationScheduler", {"scheduling": '{"0": 3}'}, holds=lambda run: run["steps"] == 4),
    Case("LambdaCallback"),
    Case("LearningRateFinder", {"num_training_steps": 15, "max_lr": 0.1}, {"trainer.max_epochs": 2},
         holds=lambda run: _config(run)["optimizer"]["init_args"]["lr"] not in (1e-3, 2e-4)),
    Case("LearningRateMonitor", run=LOGGED, holds=lambda run: "lr-AdamW" in _metrics(run)),
    Case("ModelCheckpoint", {"monitor": "val_loss"}, holds=lambda run: any((run["run"] / "checkpoints").iterdir())),
    Case("ModelSummary", says="Trainable params"),
    Case("OnExceptionCheckpoint", {"dirpath": "kept"}),
    Case("RichModelSummary", says="Trainable params"),
    Case("RichProgressBar", run={"trainer.enable_progress_bar": "true"}),
    Case("SpikeDetection"),
    Case("ThroughputMonitor", {"batch_size_fn": "holding.rows_of", "window_size": 4}, LOGGED,
         holds=lambda run: "samples_per_sec" in _metrics(run)),
    Case("Timer", {"duration": "00:01:00:00"}),
    Case("TQDMProgressBar", run={"trainer.enable_progress_bar": "true"}, says="Epoch 0"),
    Case("BackboneFinetuning", {"unfreeze_backbone_at_epoch": 1}, {"trainer.max_epochs": 2}, says="Unfrozen by step"),
    Case("EMAWeightAveraging", {"decay": 0.5}),
    Case("StochasticWeightAveraging", {"swa_lrs": 0.01}, {"trainer.max_epochs": 3}),
    Case("WeightAveraging"),
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Of each case: the exit code, what was said, and the folder in which it ran; two run at a time."""
    found, running = {}, []
    for case in CASES:
        folder = tmp_path_factory.mktemp(case.name)
        given = [f"--trainer.callbacks.{name}={value}" for name, value in case.options.items()]
        arguments = command(folder, encoder, "nowhere", **{"model.strategy.rank": 2, **case.run})
        (folder / "holding.py").write_text(
            (folder / "holding.py").read_text() + "\n\ndef rows_of(batch):\n    return 2\n"
        )
        path = f"--trainer.callbacks+=lightning.pytorch.callbacks.{case.name}"
        running.append((case.name, folder, start([*arguments, path, *given], folder)))
        if len(running) > 1:
            found |= _ended(*running.pop(0))
    for one in running:
        found |= _ended(*one)
    return found


def _ended(name: str, folder: Path, process: Any) -> dict[str, tuple[int, str, Path]]:
    join(process)
    return {name: (process.exitcode, (folder / "out.txt").read_text(), folder)}


def test_there_is_a_case_for_each() -> None:
    assert {case.name for case in CASES} == SHIPPED


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_works_or_is_refused_by_name(case: Case, outcomes: dict[str, tuple[int, str, Path]]) -> None:
    code, told, folder = outcomes[case.name]
    assert "unexpected error" not in told
    assert code == (2 if case.refused else 0), told
    assert case.says in told
    if case.refused:
        assert "Traceback" not in told
        return
    run = recorded(folder)
    assert run["state"] == "finished"
    assert (run["run"] / "adapter" / "adapter_model.safetensors").is_file()
    assert json.dumps(run["audit"])
    assert case.holds(run), told
