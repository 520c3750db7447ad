"""What plans by the number of steps follows the steps that there are; where none can be known it is refused."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

from models import make
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA, LoRA, Stack
from peftlight.tasks import LinearWarmup, SequenceClassification
from tasks.small import QUIET, Batch, Rows, batches, class_rows, constant, loader, quiet_trainer
from tasks.test_optimization import Rates, warmed_up

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:When using `Trainer\\(accumulate_grad_batches"),
    pytest.mark.filterwarnings("ignore:You are overfitting to|You requested to overfit"),
]

MADE = batches(class_rows([5, 9, 4, 12, 7, 3, 8], [0, 1, 2, 1, 0, 0, 2]), 1)


class Stream(IterableDataset[Batch]):
    """Batches without a length."""

    def __iter__(self) -> Iterator[Batch]:
        return iter(MADE)


def stream() -> DataLoader[Batch]:
    return DataLoader(Stream(), batch_size=None)


class Fewer(Rows):
    """Half as many batches from the second epoch on."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        return loader(self.made if self.trainer.current_epoch == 0 else self.made[:3])


class EndAfter(Callback):
    """Ends the training after so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def module(strategy: Any = None, **options: Any) -> SequenceClassification:
    return SequenceClassification(make("bert"), strategy or LoRA(rank=2), **options)


def gradual() -> GradientAccumulationScheduler:
    return GradientAccumulationScheduler({1: 2, 3: 7})


def used(folder: Path, data: Any, callbacks: Any = (), ckpt_path: Path | None = None, **options: Any) -> list[float]:
    rates = Rates()
    trainer = quiet_trainer(folder, [rates, *callbacks], **options)
    trainer.fit(module(), data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return rates.used


@pytest.mark.parametrize(
    ("options", "callbacks", "steps"),
    [
        ({"max_epochs": 5}, [gradual], 7 + 4 + 4 + 1 + 1),
        ({"max_epochs": 5, "max_steps": 9}, [gradual], 9),
        ({"max_epochs": 2, "limit_train_batches": 0.5}, [], 6),
        ({"max_epochs": 2, "limit_train_batches": 4, "accumulate_grad_batches": 3}, [], 4),
        ({"max_epochs": 3, "overfit_batches": 2}, [], 6),
        ({"max_epochs": 2, "min_steps": 20}, [], 14),
        ({"max_epochs": -1, "max_steps": 8}, [], 8),
    ],
)
def test_the_rate_follows_its_formula_over_the_steps_that_there_are(
    options: dict[str, Any], callbacks: list[Any], steps: int, tmp_path: Path
) -> None:
    found = used(tmp_path, loader(MADE), [each() for each in callbacks], **options)
    assert found == pytest.approx([2e-4 * warmed_up(step, steps, 0.06) for step in range(steps)])


def test_a_training_taken_up_within_an_epoch_accumulates_and_plans_as_before(tmp_path: Path) -> None:
    whole = used(tmp_path, loader(MADE), [gradual()], max_epochs=3)
    first = used(tmp_path, loader(MADE), [gradual(), EndAfter(8)], max_epochs=3)  # one step of four in the second epoch
    assert len(first) == 8
    assert first + used(tmp_path, loader(MADE), [gradual()], tmp_path / "last.ckpt", max_epochs=3) == whole


@pytest.mark.parametrize(
    ("data", "options", "steps"),
    [
        (partial(Fewer, MADE), {"reload_dataloaders_every_n_epochs": 1}, 7 + 3 + 3 + 3),
        (stream, {"limit_train_batches": 20}, 7 * 4),
        (stream, {"limit_train_batches": 20, "accumulate_grad_batches": 2}, 3 * 4),
    ],
)
def test_a_plan_that_turns_out_to_be_too_long_still_ends_near_zero(
    data: Any, options: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    found = used(tmp_path, data(), max_epochs=4, limit_val_batches=0, **options)
    assert len(found) == steps
    assert found[-1] == pytest.approx(2e-4 * warmed_up(steps - 1, steps, 0.06))


def planning() -> AdaLoRA:
    return AdaLoRA(init_r=6, target_r=2, target_modules="attention")


@pytest.mark.parametrize(
    ("strategy", "who"), [(LoRA, "LinearWarmup"), (planning, "AdaLoRA"), (lambda: Stack([planning(), LoRA()]), "Stack")]
)
def test_data_without_a_length_is_refused_by_what_plans(strategy: Any, who: str, tmp_path: Path) -> None:
    planned = {} if who == "LinearWarmup" else {"lr_scheduler": constant}
    with pytest.raises(UserError, match=rf"{who} plans by it: the training data has no length.*max_steps.*limit_train"):
        quiet_trainer(tmp_path).fit(module(strategy(), **planned), stream())
    for advice in ({"max_steps": 5}, {"limit_train_batches": 5}):
        trainer = quiet_trainer(tmp_path, **advice)
        trainer.fit(module(strategy(), **planned), stream())
        assert trainer.global_step == 5


def test_data_without_a_length_is_no_matter_to_what_plans_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module(lr_scheduler=constant), stream())
    assert trainer.global_step == 7


@pytest.mark.parametrize(
    "schedule", [partial(LinearWarmup, total_steps=5), partial(OneCycleLR, max_lr=0.1, total_steps=5)]
)
def test_a_plan_of_the_users_that_is_too_short_is_refused(schedule: Any, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    with pytest.raises(UserError, match=r"total_steps is 5, and the training has 7 steps.*lr_scheduler.total_steps 7"):
        trainer.fit(module(lr_scheduler=schedule), loader(MADE))
    assert trainer.global_step == 0
    quiet_trainer(tmp_path, max_steps=5).fit(module(lr_scheduler=schedule), loader(MADE))


# ---- a training that trains nothing


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"optimizer": partial(torch.optim.SGD, lr=0.0)}, "The learning rate is 0: set --optimizer.lr"),
        ({"lr_scheduler": lambda optimizer: LambdaLR(optimizer, lambda step: 0.0)}, "was 0 in every step, by LambdaLR"),
        ({"optimizer": partial(torch.optim.SGD, lr=1e-30), "strategy": "stirred"}, "was 1e-30 at most: too low"),
    ],
)
def test_a_training_that_moves_nothing_is_an_error(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    still = module(trained_modules=["classifier"], **{k: v for k, v in options.items() if k != "strategy"})
    still.configure_model()
    assert still.adapter is not None
    for parameter in still.adapter.parameters().values():
        parameter.data.fill_(0.5)
    with pytest.raises(UserError, match=f"Nothing was trained: after 7 optimizer steps all 10 .*{told}.*not saved"):
        quiet_trainer(tmp_path).fit(still, loader(MADE))


def test_one_that_had_no_step_to_take_is_none(tmp_path: Path) -> None:
    still = {"optimizer": partial(torch.optim.SGD, lr=0.0)}
    quiet_trainer(tmp_path, fast_dev_run=2).fit(module(**still), loader(MADE))
    quiet_trainer(tmp_path, max_steps=0).fit(module(**still), loader(MADE))
    used(tmp_path, loader(MADE))
    assert used(tmp_path, loader(MADE), ckpt_path=tmp_path / "last.ckpt") == []


# ---- a training that ends early


@pytest.mark.parametrize(("strategy", "stack"), [(planning, 1), (lambda: Stack([planning(), LoRA()]), 2)])
def test_a_budget_that_is_not_met_is_said_with_how_much(strategy: Any, stack: int, tmp_path: Path) -> None:
    ended = module(strategy())
    quiet_trainer(tmp_path, [EndAfter(9)], max_epochs=3).fit(ended, loader(MADE))
    assert ended.adapter is not None
    left = int(ended.strategy.figures(ended.adapter)["rank/total"])
    assert left > 16
    budget, schedule = ended.unmet
    assert f"budget is not met: {left} singular values are left of 48, and target_r 2 over 8 layers allows 16" in budget
    assert "after step 9 of 21, and the budget was to be met at step 13" in budget
    assert schedule == (
        "LinearWarmup planned the learning rate over 21 steps, and the training ended after 9, where it was "
        f"{2e-4 * warmed_up(9, 21, 0.06):.3g}."
    )


def test_a_budget_that_is_met_is_not_spoken_of(tmp_path: Path) -> None:
    for end, unmet in ((13, 1), (21, 0)):
        ended = module(planning())
        quiet_trainer(tmp_path, [EndAfter(end)], max_epochs=3).fit(ended, loader(MADE))
        assert len(ended.unmet) == unmet
