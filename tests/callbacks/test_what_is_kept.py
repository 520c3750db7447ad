"""What is saved is what stands after all callbacks, and the metrics beside it are those of just that."""

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor
from torch.nn.functional import cross_entropy

from models import make
from peftlight import load_adapter
from peftlight.callbacks import Checkpoints, RunRecord, Stopping
from peftlight.checkpoint_files import read_checkpoint
from peftlight.errors import UserError
from peftlight.interop import read_record
from peftlight.signals import Stopped
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, constant, loader, padded, quiet_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch")]

TRAINED = class_rows([5, 9, 4, 12, 7, 6, 3, 8], [0, 1, 2, 1, 0, 2, 1, 0])
VALIDATED = class_rows([6, 8, 5, 7, 9], [1, 2, 0, 1, 0], seed=8)
BIAS = "model.classifier.bias"


class Data(Rows):
    """Four batches to train on, and other rows to validate on."""

    def __init__(self) -> None:
        super().__init__(batches(TRAINED, 2))

    def val_dataloader(self) -> Any:
        return loader(batches(VALIDATED, 2))


def new_task() -> SequenceClassification:
    def rapid(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.1)

    return SequenceClassification(make("bert"), LoRA(rank=2), optimizer=rapid, lr_scheduler=constant)


def of_the_saved(adapter: Path) -> dict[str, float]:
    """Loss and accuracy of the saved adapter on a fresh base, over all rows at once."""
    model, batch = make("bert"), padded(VALIDATED)
    load_adapter(model, adapter, other_base=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    hits = (logits.argmax(-1) == batch["labels"]).float()
    return {"val_loss": float(cross_entropy(logits, batch["labels"])), "val_accuracy": float(hits.mean())}


class Count(Callback):
    """Counts the validations."""

    validations = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations += 1


class Writes(Callback):
    """Writes a bias when the training ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.get_parameter(BIAS).data.copy_(torch.tensor([0.0, 7.0, 0.0]))


class WritesLast(Callback):
    """Does so in the last hook."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Writes.on_train_end(self, trainer, pl_module)  # type: ignore[arg-type]


class PutsBestBack(ModelCheckpoint):
    """Keeps the weights of the first validation, as if it were the best one, and puts them back; Lightning calls
    checkpoint callbacks after all others."""

    kept: dict[str, Tensor] | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.kept is None:
            self.kept = {name: value.clone() for name, value in pl_module.adapter.state().items()}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.kept is not None
        pl_module.adapter.load_state(self.kept)


class Exchanges(Callback):
    """Has other weights in the model at each validation, and never keeps them."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.held = pl_module.get_parameter(BIAS).data.clone()
        pl_module.get_parameter(BIAS).data.add_(torch.tensor([0.0, 2.0, 0.0]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.get_parameter(BIAS).data.copy_(self.held)


CASES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "plain": (list, {}, 3),
    "written": (lambda: [Writes()], {}, 4),
    "written last": (lambda: [WritesLast()], {}, 4),
    "put back": (lambda: [PutsBestBack()], {"enable_checkpointing": True}, 4),
    "exchanged": (lambda: [Exchanges()], {}, 4),  # and one without the user's callbacks
    "ema": (lambda: [EMAWeightAveraging(decay=0.7)], {}, 3),
    "ema late": (lambda: [EMAWeightAveraging(decay=0.7)], {"max_steps": 6}, 2),
    "average": (lambda: [WeightAveraging()], {}, 3),
    "swa": (lambda: [StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)], {}, 4),
    "below an epoch": (list, {"max_steps": 3}, 1),
    "between validations": (list, {"max_steps": 6}, 2),
    "early stopping": (lambda: [EarlyStopping("val_loss", mode="max", patience=1)], {"max_epochs": 9}, 0),
    "sanity check": (list, {"max_steps": 3, "num_sanity_val_steps": 1}, 2),
    "every two epochs": (list, {"check_val_every_n_epoch": 2}, 2),
}


def kept(folder: Path, callbacks: Sequence[Callback], **options: Any) -> tuple[int, SequenceClassification]:
    """Train with a record in `folder`; returns how many validations there were, and the task."""
    count, task = Count(), new_task()
    record = RunRecord(folder, "model: SequenceClassification\n", ["fit"], seed=7)
    torch.manual_seed(0)
    quiet_trainer(folder.parent, [record, *callbacks, count], **{"max_epochs": 3, **options}).fit(task, Data())
    return count.validations, task


def recorded_metrics(folder: Path) -> list[dict[str, float]]:
    """Those beside the adapter, and those of the run."""
    beside = read_record(folder / "adapter").metrics
    assert beside is not None
    return [beside, json.loads((folder / "run.json").read_text())["metrics"]]


@pytest.mark.parametrize("name", CASES)
def test_the_metrics_in_the_record_are_those_of_the_saved_adapter(tmp_path: Path, name: str) -> None:
    callbacks, options, validations = CASES[name]
    counted, _ = kept(tmp_path / "run", callbacks(), **options)
    for metrics in recorded_metrics(tmp_path / "run"):
        for metric, value in of_the_saved(tmp_path / "run" / "adapter").items():
            assert metrics[metric] == pytest.approx(value, abs=1e-6)
    assert counted == validations or not validations  # none twice of the same state


def test_what_callbacks_wrote_is_saved(tmp_path: Path) -> None:
    for name, callback in {"train": Writes(), "fit": WritesLast()}.items():
        kept(tmp_path / name, [callback], max_epochs=1)
        model = make("bert")
        load_adapter(model, tmp_path / name / "adapter")
        assert model.classifier.bias.tolist() == [0.0, 7.0, 0.0]


def test_the_averages_are_those_of_the_formulas(tmp_path: Path) -> None:
    """By the values that the training itself went through."""

    class Note(Callback):
        def __init__(self) -> None:
            self.steps: list[dict[str, Tensor]] = []

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            self.steps.append({name: value.clone() for name, value in pl_module.adapter.state().items()})

    for callback, mean in (
        (EMAWeightAveraging(decay=0.7), lambda values: _decaying(values, 0.7)),
        (WeightAveraging(), lambda values: torch.stack(values).mean(0)),
        # SWA takes the weights at the start of the epochs from the second on
        (StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2), lambda v: torch.stack([v[3], v[7]]).mean(0)),
    ):
        note = Note()
        _, task = kept(tmp_path / type(callback).__name__, [note, callback])
        assert task.adapter is not None
        assert len(note.steps) == 12
        for name, value in task.adapter.state().items():
            torch.testing.assert_close(value, mean([step[name] for step in note.steps]))


def _decaying(values: Sequence[Tensor], decay: float) -> Tensor:
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    return average


def test_without_a_validation_no_metric_of_an_earlier_one_is_recorded(tmp_path: Path) -> None:
    counted, _ = kept(tmp_path / "run", [], limit_val_batches=0)
    assert counted == 0
    for metrics in recorded_metrics(tmp_path / "run"):
        assert "train_loss" in metrics
        assert not [name for name in metrics if name.startswith("val_")]


def test_a_run_that_goes_on_without_validation_leaves_the_old_metrics_out(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kept(folder, [Checkpoints(folder / "checkpoints")], enable_checkpointing=True, max_epochs=1)
    assert "val_loss" in recorded_metrics(folder)[0]
    from peftlight.resume.past import open_past

    past = open_past(folder)
    record = RunRecord(folder, "model: SequenceClassification\n", ["fit"], seed=7, past=past)
    trainer = quiet_trainer(tmp_path, [record], max_epochs=2, limit_val_batches=0)
    trainer.fit(new_task(), Data(), ckpt_path=past.checkpoint, weights_only=True)
    for metrics in recorded_metrics(folder):
        assert "train_loss" in metrics
        assert "val_loss" not in metrics


class Spoils(Callback):
    """Writes a frozen weight."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.get_parameter("model.bert.encoder.layer.1.intermediate.dense.weight").data[3, 4] += 1.0


def test_what_fails_the_audit_is_saved_aside_and_loads_as_the_error_says(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=r"frozen base changed .*What was trained is not lost") as failed:
        kept(folder, [Spoils()])
    assert f"in {folder / 'adapter-unverified'}, and not in adapter/" in str(failed.value)
    assert "load_adapter(base, folder, other_base=True)" in str(failed.value)
    assert not (folder / "adapter").exists()
    of_the_saved(folder / "adapter-unverified")
    found = json.loads((folder / "run.json").read_text())
    assert found["state"] == "failed"
    assert "adapter-unverified" in found["error"]


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), Stopped(signal.SIGTERM)], ids=["error", "signal"])
def test_a_validation_that_fails_or_is_ended_at_the_end_loses_no_training(tmp_path: Path, error: BaseException) -> None:
    class Fails(Callback):
        def on_validation_start(self, *_: Any) -> None:
            raise error

    with pytest.raises(type(error)):
        kept(tmp_path / "run", [Fails()], max_steps=3)
    of_the_saved(tmp_path / "run" / "adapter")
    assert not [name for name in recorded_metrics(tmp_path / "run")[0] if name.startswith("val_")]


def test_an_average_that_is_in_the_model_for_a_validation_gets_into_no_checkpoint(tmp_path: Path) -> None:
    """A signal within such a validation is heard when the weights are back."""

    class Note(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            self.last = {name: value.clone() for name, value in pl_module.adapter.state().items()}

        def on_validation_batch_start(self, *_: Any) -> None:
            signal.raise_signal(signal.SIGTERM)

    note = Note()
    callbacks = [EMAWeightAveraging(decay=0.7), note, Stopping(), Checkpoints(tmp_path / "checkpoints")]
    with pytest.raises(Stopped):
        kept(tmp_path / "run", callbacks, enable_checkpointing=True)
    found = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    for name, value in note.last.items():
        assert torch.equal(found["current_model_state"][f"model.{name}"], value)
        assert not torch.equal(found["state_dict"][f"model.{name}"], value) or "deltas" in name
