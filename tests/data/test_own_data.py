"""A LightningDataModule of the user's is data for every command, by its path."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from data.own_data import SOURCE
from forked import peftlight
from models import make
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM, SequenceClassification
from tasks.small import QUIET, batches, class_rows, loader, quiet_trainer, token_rows

pytestmark = QUIET


def arguments(encoder: Path, command: str, *more: str) -> list[str]:
    options = {"model": "SequenceClassification", "model.strategy": "LoRA", "model.base_model": encoder,
               "data": "mine.MyData", "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
               "trainer.max_epochs": 1, "trainer.log_every_n_steps": 1}  # fmt: skip
    return [command, *(f"--{name}={value}" for name, value in options.items()), *more]


def newest(folder: Path, command: str) -> Path:
    return max((folder / "runs").glob(f"*-{command}-*"))


@pytest.fixture(scope="module")
def fitted(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the module and a run on two validation loaders."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "mine.py").write_text(SOURCE)
    code, told = peftlight(arguments(encoder, "fit", "--data.loaders=2"), folder)
    assert code == 0, told
    return folder


def test_metrics_are_of_all_rows_and_of_each_loader(fitted: Path) -> None:
    with open(newest(fitted, "fit") / "metrics.csv", newline="") as file:
        row = next(one for one in csv.DictReader(file) if one["val_loss"])
    first, second = (float(row[f"val_loss/dataloader_idx_{loader}"]) for loader in (0, 1))
    assert float(row["val_loss"]) == pytest.approx((10 * first + 3 * second) / 13, rel=1e-5)
    assert first != second
    counts = [sum(float(row[f"val_{one}_as_{other}{of}"]) for one in ("cold", "hot") for other in ("cold", "hot"))
              for of in ("", "/dataloader_idx_0", "/dataloader_idx_1")]  # fmt: skip
    assert counts == [13, 10, 3]
    run = json.loads((newest(fitted, "fit") / "run.json").read_text())
    assert run["state"] == "finished"
    assert run["metrics"]["val_loss"] == pytest.approx(float(row["val_loss"]), rel=1e-5)


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_other_commands_take_it_too(command: str, fitted: Path, encoder: Path) -> None:
    code, told = peftlight(arguments(encoder, command, "--ckpt_path=last"), fitted)
    assert code == 0, told
    folder = newest(fitted, command)
    if command == "predict":
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == list(range(10))
        assert {line["label"] for line in lines} <= {"cold", "hot"}
        return
    metrics = json.loads((folder / "run.json").read_text())["metrics"]
    stage = "val" if command == "validate" else "test"
    assert 0 <= metrics[f"{stage}_accuracy"] <= 1
    assert metrics[f"{stage}_loss"] > 0


def test_evaluate_takes_it_by_a_configuration_that_is_named(fitted: Path, encoder: Path) -> None:
    run = newest(fitted, "fit").relative_to(fitted)
    code, told = peftlight(["evaluate", run], fitted)
    assert code == 2
    assert f"--config {run}/config.yaml" in told.replace(str(fitted) + "/", "")
    code, told = peftlight(["evaluate", run, "--config", run / "config.yaml", "--json", "found.json"], fitted)
    assert code == 0, told
    (found,) = [row for row in json.loads((fitted / "found.json").read_text())["rows"] if row["metrics"]]
    recorded = json.loads((fitted / run / "run.json").read_text())["metrics"]
    assert found["metrics"]["loss"] == pytest.approx(recorded["val_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        ("fit", ["--data.without=labels"], ["reads the column 'labels'", "MyData has input_ids, attention_mask, row"]),
        ("fit", ["--data.without=input_ids"], ["reads the column 'input_ids'"]),
        ("fit", ["--data.lists=true"], ["MyData gives a list as a batch"]),
        ("predict", ["--data.without=row"], ["reads the column 'row'", "Data of your own"]),
        ("predict", ["--data.loaders=2"], ["several loaders", "Return one"]),
        ("predict", ["--data.same=true"], ["same number in the column 'row', as 1"]),
        ("predict", ["--data.by_position=true"], ["batch_size by position", "DataLoader(rows, batch_size=...)"]),
        ("fit", ["--data=mine.Nothing"], ["mine.Nothing is not a LightningDataModule"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_what_is_missing_is_told(
    command: str, options: list[str], says: list[str], fitted: Path, encoder: Path
) -> None:
    code, told = peftlight(arguments(encoder, command, *options), fitted)
    assert code == 2, told
    assert all(each in told for each in says), told


def test_a_message_names_public_classes_that_can_be_chosen(encoder: Path, tmp_path: Path) -> None:
    given = [one.replace("mine.MyData", "SST3") for one in arguments(encoder, "fit")]
    code, told = peftlight(given, tmp_path)
    assert code == 2
    assert "TextClassification" in told
    assert not [name for name in ("TextData", "DataFamily", "Boring") if name in told]


class Two(LightningDataModule):
    """The same rows in one validation loader, or divided among two or three."""

    def __init__(self, made: Any, *sizes: int) -> None:
        super().__init__()
        self.made, self.sizes = made, sizes

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.made)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        ends = [sum(self.sizes[: count + 1]) for count in range(len(self.sizes))]
        return [loader(self.made[end - size : end]) for end, size in zip(ends, self.sizes, strict=True)]


def test_each_loader_has_the_metrics_that_it_has_alone(tmp_path: Path) -> None:
    rows = batches(class_rows([5, 9, 4, 12, 7, 6], [0, 1, 2, 1, 0, 1]), 1)
    module = SequenceClassification(make("bert"), LoRA(rank=2), num_labels=3)
    trainer = quiet_trainer(tmp_path)
    (both, *_) = found = trainer.validate(module, Two(rows, 4, 2), verbose=False)
    assert len(found) == 2
    together = {**both, **found[1]}
    (alone,) = trainer.validate(module, Two(rows, 6), verbose=False)
    assert {name: value for name, value in together.items() if "/" not in name} == pytest.approx(alone)
    for number, part in enumerate((rows[:4], rows[4:])):
        (own,) = trainer.validate(module, loader(part), verbose=False)
        apart = {name: value for name, value in together.items() if name.endswith(f"/dataloader_idx_{number}")}
        assert {name.partition("/")[0]: value for name, value in apart.items()} == pytest.approx(own)


def test_the_metrics_of_a_language_model_too(tmp_path: Path) -> None:
    rows = batches(token_rows([5, 9, 4]), 1)
    module, trainer = CausalLM(make("llama"), LoRA(rank=2)), quiet_trainer(tmp_path, limit_train_batches=1)
    trainer.fit(module, Two(rows, 1, 2))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    first, second = found["val_loss/dataloader_idx_0"], found["val_loss/dataloader_idx_1"]
    assert found["val_loss"] == pytest.approx((4 * first + 11 * second) / 15)
    assert found["val_perplexity/dataloader_idx_1"] == pytest.approx(torch.tensor(second).exp().item())


def test_from_python_a_missing_column_is_told_as_well(tmp_path: Path) -> None:
    rows = [{"input_ids": torch.ones(2, 3, dtype=torch.long)}]
    module = SequenceClassification(make("bert"), LoRA(rank=2), num_labels=3)
    with pytest.raises(UserError, match=r"reads the column 'labels', and a batch of the data has input_ids"):
        quiet_trainer(tmp_path).fit(module, loader(rows))
