"""Which parameters the optimizer gets, and how the learning rate moves."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from models import make
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.tasks import LinearWarmup, SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, constant, loader, quiet_trainer, trained

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")]

ROWS = class_rows([5, 9, 4, 12, 7, 3, 8], [0, 1, 2, 1, 0, 0, 2])


class Rates(Callback):
    """Notes the learning rate that each optimizer step uses."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


def module(**options: Any) -> SequenceClassification:
    return SequenceClassification(make("bert"), LoRA(rank=2), **options)


def used_rates(folder: Path, size: int = 1, ckpt_path: Path | None = None, given: Any = None, **options: Any) -> list:
    rates = Rates()
    trainer = quiet_trainer(folder, [rates], **options)
    trainer.fit(given or module(), loader(batches(ROWS, size)), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return rates.used


def warmed_up(step: int, total: int, warmup: float) -> float:
    """The formula: up by equal parts to the peak, then down by equal parts to zero after the last step."""
    rising = round(warmup * total)
    return (step + 1) / rising if step < rising else (total - step) / (total - rising)


def test_the_default_is_adamw_over_what_trains_and_nothing_else(tmp_path: Path) -> None:
    tuned, trainer = module(), quiet_trainer(tmp_path)
    trainer.fit(tuned, loader(batches(ROWS, 2)))
    (optimizer,) = trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 2e-4
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert tuned.model is not None
    assert sorted(given) == sorted(id(p) for p in trained(tuned.model).values())
    assert 0 < len(given) < len(list(tuned.model.parameters()))


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_default_learning_rate_follows_its_formula_over_all_steps(accumulate: int, tmp_path: Path) -> None:
    used = used_rates(tmp_path, max_epochs=6, accumulate_grad_batches=accumulate)
    total = 6 * -(-7 // accumulate)
    assert len(used) == total
    assert used == pytest.approx([2e-4 * warmed_up(step, total, 0.06) for step in range(total)])


def test_max_steps_is_the_number_of_steps_where_it_comes_first(tmp_path: Path) -> None:
    used = used_rates(
        tmp_path, max_epochs=-1, max_steps=10, given=module(lr_scheduler=partial(LinearWarmup, warmup=0.3))
    )
    assert used == pytest.approx([2e-4 * warmed_up(step, 10, 0.3) for step in range(10)])


@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 10, 101])
def test_the_warmup_begins_above_zero_reaches_the_peak_and_never_stops_training(warmup: float, total: int) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = LinearWarmup(optimizer, warmup=warmup)
    scheduler.plan(total)
    used = []
    for _ in range(total):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert min(used) > 0
    assert max(used) == 1
    peak = used.index(1.0)
    assert used[: peak + 1] == sorted(used[: peak + 1])
    assert used[peak:] == sorted(used[peak:], reverse=True)
    assert scheduler.get_last_lr() == [0.0]


def test_a_number_of_steps_that_is_given_stays(tmp_path: Path) -> None:
    planned = module(lr_scheduler=partial(LinearWarmup, warmup=0.0, total_steps=100))
    used = used_rates(tmp_path, given=planned)
    assert used == pytest.approx([2e-4 * (100 - step) / 100 for step in range(7)])


def test_a_run_that_goes_on_for_longer_plans_its_rate_anew(tmp_path: Path) -> None:
    used_rates(tmp_path, max_epochs=1)
    used = used_rates(tmp_path, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert used == pytest.approx([2e-4 * warmed_up(step, 14, 0.06) for step in range(7, 14)])


def test_a_run_that_is_broken_off_and_resumed_uses_the_rates_of_a_whole_one(tmp_path: Path) -> None:
    whole = used_rates(tmp_path, max_epochs=2)

    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    first = Rates()
    trainer = quiet_trainer(tmp_path, [first, Stop()], max_epochs=2)
    trainer.fit(module(), loader(batches(ROWS, 1)))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert first.used + used_rates(tmp_path, max_epochs=2, ckpt_path=tmp_path / "half.ckpt") == pytest.approx(whole)


def test_an_optimizer_and_a_scheduler_of_ones_own_are_used(tmp_path: Path) -> None:
    own = module(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, T_max=10),
    )
    reference = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.5)
    cosine, expected = CosineAnnealingLR(reference, T_max=10), []
    for _ in range(7):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        cosine.step()
    assert used_rates(tmp_path, given=own) == pytest.approx(expected)


def test_an_optimizer_that_computes_a_step_several_times_does_as_in_plain_torch(tmp_path: Path) -> None:
    made, lbfgs = batches(ROWS[:4], 2), partial(torch.optim.LBFGS, lr=0.1, max_iter=3)
    ours, plain = module(optimizer=lbfgs, lr_scheduler=constant), module()
    for each in (ours, plain):
        torch.manual_seed(1)
        each.configure_model()
    quiet_trainer(tmp_path).fit(ours, loader(made))
    plain.model.train()
    optimizer = lbfgs([p for p in plain.parameters() if p.requires_grad])

    def loss_of(batch: Any) -> torch.Tensor:
        optimizer.zero_grad()
        loss, labels = plain.loss(batch)
        (loss / labels).backward()
        return loss.detach() / labels

    for batch in made:
        optimizer.step(partial(loss_of, batch))
    for name, value in trained(plain.model).items():
        torch.testing.assert_close(trained(ours.model)[name], value, rtol=1e-4, atol=1e-6)


def test_reduce_on_plateau_watches_the_validation_loss(tmp_path: Path) -> None:
    still = module(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6),  # the loss stays about the same
        lr_scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, factor=0.1, patience=0, eps=0),
    )
    rates = Rates()
    quiet_trainer(tmp_path, [rates], max_epochs=3).fit(still, Rows(batches(ROWS, 7)))
    assert rates.used == pytest.approx([1e-6, 1e-6, 1e-7], rel=1e-6, abs=0)


def test_an_unknown_number_of_steps_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"number of steps is not known.*max_epochs"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(module(), loader(batches(ROWS, 2)))


def test_an_unknown_number_of_steps_is_fine_for_a_constant_rate(tmp_path: Path) -> None:
    rates = Rates()
    trainer = quiet_trainer(tmp_path, [rates], max_epochs=-1, max_time={"seconds": 1})
    trainer.fit(module(lr_scheduler=constant), loader(batches(ROWS, 7)))
    assert set(rates.used) == {2e-4}


@pytest.mark.parametrize("options", [{"warmup": 1.5}, {"warmup": -0.1}, {"total_steps": 0}])
def test_a_warmup_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    (name, value), *_ = options.items()
    with pytest.raises(UserError, match=rf"{name}.*{value}"):
        LinearWarmup(optimizer, **options)
