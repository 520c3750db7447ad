"""A task whose loss is the user's own trains, validates and tests by that one loss."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from torch import Tensor

from models import make
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM, PEFTModule, Seq2Seq, SequenceClassification
from tasks.small import QUIET, Batch, batches, class_rows, loader, quiet_trainer, token_rows

pytestmark = QUIET

LENGTHS = [5, 9, 4, 12, 7, 3, 8]
LABELS = [0, 1, 2, 1, 0, 0, 2]
WEIGHTS = torch.tensor([0.2, 3.0, 0.7])


class Weighted(SequenceClassification):
    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        labels = batch["labels"]
        return F.cross_entropy(self.logits(batch), labels, WEIGHTS, reduction="sum"), WEIGHTS[labels].sum()


class PastTheLogits(SequenceClassification):
    """Asks the model itself, takes the labels out of the batch, and adds something."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        labels = batch.pop("labels")
        scores = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return F.cross_entropy(scores, labels, reduction="sum") + 5.0 * len(labels), torch.tensor(len(labels))


def smoothed(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    kept = labels != -100
    return F.cross_entropy(scores[kept], labels[kept], label_smoothing=0.3, reduction="sum"), kept.sum()


class SmoothedLanguage(CausalLM):
    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return smoothed(self.logits(batch)[:, :-1], batch["labels"][:, 1:])


class SmoothedText(Seq2Seq):
    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return smoothed(self.logits(batch), batch["labels"])


class Forwards(Callback):
    """Counts how often the base computes."""

    def __init__(self) -> None:
        self.count = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.model.register_forward_hook(self._counted)

    def _counted(self, *_: Any) -> None:
        self.count += 1


def mean(module: PEFTModule, made: list[Batch]) -> float:
    """The module's loss per label over all batches."""
    assert module.model is not None
    module.model.eval()
    with torch.no_grad():
        pairs = [module.loss(dict(batch)) for batch in made]
    return float(sum(loss for loss, _ in pairs)) / float(sum(count for _, count in pairs))


def run(module: PEFTModule, stage: str, made: list[Batch], folder: Path) -> tuple[dict[str, float], int]:
    """What is reported of the stage, and how many forwards it took."""
    module.configure_model()
    forwards = Forwards()
    trainer: Any = quiet_trainer(folder, [forwards])
    (found,) = getattr(trainer, stage)(module, loader([dict(batch) for batch in made]), verbose=False)
    return found, forwards.count


@pytest.mark.parametrize("stage", ["validate", "test"])
@pytest.mark.parametrize("task", [SequenceClassification, Weighted, PastTheLogits])
def test_the_loss_that_is_reported_is_the_one_that_is_trained(
    task: type[PEFTModule], stage: str, tmp_path: Path
) -> None:
    made = batches(class_rows(LENGTHS, LABELS), 3)
    module = task(make("bert"), LoRA(rank=2))
    found, forwards = run(module, stage, made, tmp_path)
    own = "val" if stage == "validate" else "test"
    assert found[f"{own}_loss"] == pytest.approx(mean(module, made), rel=1e-5)
    assert forwards == len(made) * (2 if task is PastTheLogits else 1)
    plain, _ = run(SequenceClassification(make("bert"), LoRA(rank=2)), stage, made, tmp_path)
    same = {name: value for name, value in plain.items() if not name.endswith("_loss")}
    assert {name: found[name] for name in same} == pytest.approx(same)
    if task is not SequenceClassification:
        assert found[f"{own}_loss"] != pytest.approx(plain[f"{own}_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("task", "model", "options"),
    [(SmoothedLanguage, "llama", {}), (SmoothedText, "t5", {"generate_rows": 0})],
)
def test_a_perplexity_stays_that_of_the_labels(
    task: type[PEFTModule], model: str, options: dict[str, Any], tmp_path: Path
) -> None:
    made = batches(token_rows(LENGTHS), 3)
    module = task(make(model), LoRA(rank=2), **options)
    found, forwards = run(module, "validate", made, tmp_path)
    parent: Any = task.__mro__[1]
    plain = parent(make(model), LoRA(rank=2), **options)
    plain.configure_model()
    assert found["val_loss"] == pytest.approx(mean(module, made), rel=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(mean(plain, made)), rel=1e-4)
    assert found["val_perplexity"] != pytest.approx(math.exp(found["val_loss"]), rel=1e-3)
    assert forwards == len(made)
