"""Metrics equal those computed by hand from the model's outputs, over batches of different sizes."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from models import make
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM, PEFTModule, SequenceClassification
from tasks.small import QUIET, Batch, Row, class_rows, loader, padded, quiet_trainer, stirred, token_rows

pytestmark = QUIET

LENGTHS = [5, 39, 3, 40, 17, 2, 33, 9, 11, 21]


def uneven(rows: list[Row]) -> list[Batch]:
    return [padded(rows[:1]), padded(rows[1:6]), padded(rows[6:8]), padded(rows[8:])]


def stirred_module(module: PEFTModule) -> PEFTModule:
    module.configure_model()
    assert module.adapter is not None
    stirred(module.adapter)
    return module


def classifier(classes: int) -> PEFTModule:
    model = make("bert")
    if classes == 2:
        model.classifier = torch.nn.Linear(32, 2)
        model.config.num_labels = 2
    module = stirred_module(SequenceClassification(model, LoRA(rank=2)))
    mean = torch.stack(scores_alone(module, class_rows(LENGTHS, [0] * len(LENGTHS)))).mean(0)
    with torch.no_grad():
        model.classifier.bias -= mean  # so that every class is guessed now and then
    return module


def scores_alone(module: PEFTModule, rows: list[Row]) -> list[Tensor]:
    with torch.no_grad():
        return [module.model(input_ids=row["input_ids"][None]).logits[0].double() for row in rows]


def f1_of(truth: list[int], guess: list[int], label: int) -> float:
    hits = sum(t == g == label for t, g in zip(truth, guess, strict=True))
    return 2 * hits / (truth.count(label) + guess.count(label)) if hits else 0.0


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_classification_metrics_equal_those_by_hand(classes: int, stage: str, tmp_path: Path) -> None:
    labels = [0, 1, -1, 1, classes - 1, 0, 0, 1, -1, classes - 1]
    rows, module = class_rows(LENGTHS, labels), classifier(classes)
    scored = [(row, scores) for row, scores in zip(rows, scores_alone(module, rows), strict=True) if row["labels"] >= 0]
    truth, guess = [row["labels"] for row, _ in scored], [int(scores.argmax()) for _, scores in scored]
    assert len(set(guess)) > 1
    f1s = [f1_of(truth, guess, label) for label in range(classes)]
    expected = {
        f"{stage}_accuracy": sum(t == g for t, g in zip(truth, guess, strict=True)) / len(truth),
        f"{stage}_f1": f1s[1] if classes == 2 else sum(f1s) / classes,
        f"{stage}_loss": -sum(float(scores.log_softmax(-1)[row["labels"]]) for row, scores in scored) / len(scored),
    }
    for t in range(classes):
        for g in range(classes):
            expected[f"{stage}_{t}_as_{g}"] = sum(pair == (t, g) for pair in zip(truth, guess, strict=True))
    run = getattr(quiet_trainer(tmp_path), {"val": "validate", "test": "test"}[stage])
    (found,) = run(module, loader(uneven(rows)), verbose=False)
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_validation_batch_without_labels_counts_for_nothing(tmp_path: Path) -> None:
    known, unknown = class_rows([5, 8], [0, 2]), class_rows([7, 3], [-1, -1], seed=9)
    module, trainer = classifier(3), quiet_trainer(tmp_path)
    (alone,) = trainer.validate(module, loader([padded(known)]), verbose=False)
    (beside,) = trainer.validate(module, loader([padded(unknown), padded(known)]), verbose=False)
    assert beside == pytest.approx(alone)


class BrokenOff(Callback):
    def on_validation_batch_end(self, *args: object) -> None:
        raise RuntimeError("broken off")


def test_metrics_start_afresh_in_each_validation(tmp_path: Path) -> None:
    rows, module, trainer = class_rows(LENGTHS, [0, 1, 2, 1, 2, 0, 0, 1, 2, 2]), classifier(3), quiet_trainer(tmp_path)
    first = trainer.validate(module, loader(uneven(rows)), verbose=False)
    assert trainer.validate(module, loader(uneven(rows)), verbose=False) == first
    with pytest.raises(RuntimeError, match="broken off"):
        quiet_trainer(tmp_path, [BrokenOff()]).validate(module, loader(uneven(rows)), verbose=False)
    assert trainer.validate(module, loader(uneven(rows)), verbose=False) == first


@pytest.mark.parametrize("stage", ["val", "test"])
def test_perplexity_is_weighted_by_tokens(stage: str, tmp_path: Path) -> None:
    rows = token_rows(LENGTHS, masked=2)
    module = stirred_module(CausalLM(make("llama"), LoRA(rank=2)))
    total, count = 0.0, 0
    for row, scores in zip(rows, scores_alone(module, rows), strict=True):
        for score, target in zip(scores[:-1], row["labels"][1:].tolist(), strict=True):
            if target != -100:
                total, count = total - float(score.log_softmax(-1)[target]), count + 1
    run = getattr(quiet_trainer(tmp_path), {"val": "validate", "test": "test"}[stage])
    (found,) = run(module, loader(uneven(rows)), verbose=False)
    expected = {f"{stage}_loss": total / count, f"{stage}_perplexity": math.exp(total / count)}
    assert found == pytest.approx(expected, rel=1e-5)
