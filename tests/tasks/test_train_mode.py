"""Dropout is on while training and off while validating, and the statistics of a frozen base stay what they were."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn

from models import make
from peftlight.strategies import BitFit, Full, LoRA
from peftlight.strategy import PEFTStrategy
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, Rows, Watch, batches, class_rows, constant, loader, quiet_trainer, standing_still

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Found . module.s. in eval mode at the start of training")]

ROWS = class_rows([5, 9, 4, 12], [0, 1, 2, 1])


class Modes(Callback):
    """Notes at every training and validation step the mode of the model and of each of its dropouts."""

    def __init__(self) -> None:
        self.training: list[set[bool]] = []
        self.validating: list[set[bool]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.training.append(_modes(pl_module.model))

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validating.append(_modes(pl_module.model))


def _modes(model: nn.Module) -> set[bool]:
    return {model.training} | {module.training for module in model.modules() if isinstance(module, nn.Dropout)}


class Normed(nn.Module):
    """A classifier with batch normalisation."""

    def __init__(self, affine: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 8)
        self.mixed = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8, affine=affine)
        self.head = nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.norm(self.mixed(self.table(input_ids).mean(1))))


@dataclass
class NormTrained(PEFTStrategy):
    """Trains the normalisation as a whole module."""

    def train(self, model: nn.Module) -> Iterable[str]:
        return ["norm"]


@pytest.mark.parametrize("loaded_in_training", [False, True])
def test_dropout_is_on_at_every_training_step_and_off_in_validation(loaded_in_training: bool, tmp_path: Path) -> None:
    model = make("bert", dropout=0.1).train(loaded_in_training)
    module, modes = SequenceClassification(model, LoRA(dropout=0.1)), Modes()
    trainer = quiet_trainer(tmp_path, [modes], max_epochs=2, val_check_interval=1, num_sanity_val_steps=1)
    trainer.fit(module, Rows(batches(ROWS, 2)))
    assert modes.training == [{True}] * 4
    assert modes.validating == [{False}] * (1 + 4 * 2)
    assert model.training


def test_dropout_changes_the_loss_between_equal_steps(tmp_path: Path) -> None:
    model, watch = make("bert", dropout=0.3), Watch()
    module = SequenceClassification(model, LoRA(), optimizer=standing_still, lr_scheduler=constant)
    quiet_trainer(tmp_path, [watch]).fit(module, loader(batches(ROWS, 4) * 2))
    first, second = (logged["train_loss"] for logged in watch.logged)
    assert first != second


def _fitted_norm(strategy: PEFTStrategy, folder: Path, affine: bool = True) -> tuple[Tensor, Tensor]:
    """The running mean before and after a fit."""
    torch.manual_seed(0)
    model = Normed(affine)
    before = model.norm.running_mean.clone()  # type: ignore[union-attr]
    module = SequenceClassification(model, strategy, num_labels=3, trained_modules=["head"])
    quiet_trainer(folder, max_epochs=2, val_check_interval=1).fit(module, Rows(batches(ROWS, 2)))
    assert model.norm.running_mean is not None
    return before, model.norm.running_mean


def test_statistics_of_a_frozen_batch_norm_stay_bit_for_bit(tmp_path: Path) -> None:
    before, after = _fitted_norm(LoRA(target_modules=["mixed"]), tmp_path)
    assert torch.equal(before, after)


def test_statistics_stay_where_only_the_bias_of_the_batch_norm_trains(tmp_path: Path) -> None:
    """They are not among what BitFit saves, so a reloaded adapter would otherwise compute something else."""
    before, after = _fitted_norm(BitFit(), tmp_path)
    assert torch.equal(before, after)


@pytest.mark.parametrize(("strategy", "affine"), [(Full(), True), (Full(), False), (NormTrained(), True)])
def test_statistics_of_a_trained_batch_norm_move(strategy: PEFTStrategy, affine: bool, tmp_path: Path) -> None:
    before, after = _fitted_norm(strategy, tmp_path, affine)
    assert not torch.equal(before, after)
