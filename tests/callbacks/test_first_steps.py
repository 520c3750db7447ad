"""What a fit records of its first steps."""

import csv
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from commands.trained import COMMAND_LINE, fitted
from peftlight.callbacks.first_steps import FIRST_STEPS, FirstSteps
from peftlight.data import SST2

pytestmark = COMMAND_LINE
OPTIONS: dict[str, Any] = {"data__source": "sample:sentiment", "data__batch_size": 4, "trainer__max_epochs": -1,
                           "trainer__limit_val_batches": 0}  # fmt: skip


def record_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def test_losses_of_the_first_steps_are_recorded_with_all_their_digits(tmp_path: Path, encoder: Path) -> None:
    run = fitted(tmp_path, encoder, "lora", **OPTIONS, trainer__max_steps=FIRST_STEPS + 2,
                 trainer__limit_train_batches=5, trainer__accumulate_grad_batches=2)  # fmt: skip
    record = record_of(run)
    with open(run / "metrics.csv", newline="") as file:
        logged = [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]
    assert len(logged) == FIRST_STEPS + 2
    assert [step["loss"] for step in record["first_steps"]] == logged[:FIRST_STEPS]
    assert [len(step["batches"]) for step in record["first_steps"][:4]] == [2, 2, 1, 2]  # an epoch has five batches
    assert record["threads"] == torch.get_num_threads()
    assert record["device"].startswith("cpu")


def test_a_batch_is_known_by_all_of_its_tensors(encoder: Path) -> None:
    data = SST2(source="sample:sentiment", batch_size=2, tokenizer=str(encoder))
    data.prepare_data()
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    sha = hashlib.sha256()
    for name in sorted(batch):
        array: np.ndarray[Any, Any] = batch[name].numpy()
        sha.update(f"{name} {array.shape} torch.{array.dtype} ".encode() + array.tobytes())
    steps = FirstSteps(None)  # type: ignore[arg-type]
    trainer: Any = type("Trainer", (), {"global_step": 1, "callback_metrics": {"train_loss": torch.tensor(0.5)}})
    steps.on_train_batch_end(trainer, None, None, batch, 0)  # type: ignore[arg-type]
    assert steps.steps == [{"loss": 0.5, "batches": [sha.hexdigest()[:12]]}]


def test_a_training_that_goes_on_says_where_it_began_and_takes_no_later_step_for_a_first() -> None:
    noted: dict[str, Any] = {"device": "cuda", "threads": 8}
    record: Any = SimpleNamespace(record=noted, note=lambda **facts: noted.update(facts))
    trainer: Any = SimpleNamespace(global_step=7, is_global_zero=True, callback_metrics={"train_loss": torch.ones(())})
    module: Any = SimpleNamespace(device=torch.device("cpu"))
    for known in (0, 7):
        steps = FirstSteps(record)
        steps.steps = [{"loss": 0.5, "batches": ["0"]}] * known
        trainer.global_step = 7
        steps.on_train_start(trainer, module)
        for step in (7, 8):  # a window of two batches
            trainer.global_step = step
            steps.on_train_batch_end(trainer, module, None, {}, 0)
        steps.on_train_end(trainer, module)
        assert len(noted.get("first_steps", [])) == (8 if known else 0)
    assert (noted["device"], noted["threads"]) == ("cuda", 8)


@pytest.mark.parametrize("seed", [1, 2])
def test_another_seed_has_other_batches(tmp_path: Path, encoder: Path, seed: int) -> None:
    runs = [fitted(tmp_path, encoder, "lora", **OPTIONS, trainer__max_steps=2, seed_everything=s) for s in (1, seed)]
    one, other = (record_of(run)["first_steps"] for run in runs)
    assert (one == other) == (seed == 1)
