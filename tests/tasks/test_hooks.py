"""A strategy's penalty and after_step: how often they are called, and what they add."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from models import make
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.strategy import Adapter
from peftlight.tasks import SequenceClassification
from tasks.small import (
    QUIET,
    Watch,
    assert_equal_states,
    batches,
    class_rows,
    constant,
    loader,
    padded,
    quiet_trainer,
    standing_still,
    stirred,
    trained,
)

pytestmark = QUIET

ROWS = class_rows([5, 39, 3, 40, 17, 2, 33, 9], [0, 2, 1, 1, 1, 0, 0, 2])
WEIGHT = 0.3


def squares(adapter: Adapter) -> Tensor:
    return torch.stack([p.square().sum() for site in adapter.sites.values() for p in site.parameters()]).sum()


@dataclass
class Shrinking(LoRA):
    """LoRA with a penalty on the squares of its matrices."""

    def penalty(self, adapter: Adapter) -> Tensor:
        return WEIGHT * squares(adapter)


@dataclass
class Counting(LoRA):
    """LoRA that notes when it is called after a step, and how large the gradient is then."""

    calls: list[tuple[int, int]] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)

    def after_step(self, adapter: Adapter, step: int, last_step: int) -> None:
        self.calls.append((step, last_step))
        self.gradients.append(sum(float(p.grad.norm()) for p in adapter.parameters().values() if p.grad is not None))


def module_with(strategy: LoRA) -> SequenceClassification:
    module = SequenceClassification(make("bert"), strategy, optimizer=standing_still, lr_scheduler=constant)
    module.configure_model()
    assert module.adapter is not None
    stirred(module.adapter)
    return module


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_gradient_of_the_penalty_is_added_once_for_each_step(accumulate: int, tmp_path: Path) -> None:
    module, watch = module_with(Shrinking(rank=2)), Watch()
    assert module.adapter is not None
    assert module.model is not None
    batch, parameters = padded(ROWS), trained(module.model)
    logits = module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    task = -logits.log_softmax(-1)[torch.arange(8), batch["labels"]].mean()
    penalty = WEIGHT * squares(module.adapter)
    gradients = torch.autograd.grad(task + penalty, list(parameters.values()))
    trainer = quiet_trainer(tmp_path, [watch], accumulate_grad_batches=accumulate, max_epochs=2)
    trainer.fit(module, loader(batches(ROWS, 8 // accumulate)))
    assert len(watch.gradients) == 2
    for step, logged in zip(watch.gradients, watch.logged, strict=True):
        assert_equal_states(step, dict(zip(parameters, gradients, strict=True)), rtol=1e-5, atol=1e-6)
        assert logged["train_penalty"] == pytest.approx(penalty.item(), rel=1e-6)
        assert logged["train_loss"] == pytest.approx(task.item(), rel=1e-5)


def test_without_a_penalty_none_is_logged(tmp_path: Path) -> None:
    watch = Watch()
    quiet_trainer(tmp_path, [watch]).fit(module_with(LoRA(rank=2)), loader(batches(ROWS, 8)))
    assert "train_penalty" not in watch.logged[0]


def test_after_step_is_called_once_for_each_optimizer_step_while_gradients_are_there(tmp_path: Path) -> None:
    strategy = Counting(rank=2)
    trainer = quiet_trainer(tmp_path, accumulate_grad_batches=3, max_epochs=2)
    trainer.fit(module_with(strategy), loader(batches(ROWS, 2)))
    assert strategy.calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(gradient > 0 for gradient in strategy.gradients)


def test_after_step_counts_on_in_a_run_that_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    first = quiet_trainer(tmp_path, max_epochs=1)
    first.fit(module_with(Counting(rank=2)), loader(batches(ROWS, 4)))
    first.save_checkpoint(tmp_path / "one.ckpt")
    strategy = Counting(rank=2)
    second = quiet_trainer(tmp_path, max_epochs=2)
    second.fit(module_with(strategy), loader(batches(ROWS, 4)), ckpt_path=tmp_path / "one.ckpt")
    assert strategy.calls == [(3, 4), (4, 4)]


def test_a_strategy_that_plans_its_steps_needs_their_number(tmp_path: Path) -> None:
    class Stop(Watch):
        def on_train_epoch_end(self, trainer: object, pl_module: LightningModule) -> None:
            pl_module.trainer.should_stop = True

    endless = {"max_epochs": -1, "callbacks": [Stop()]}
    quiet_trainer(tmp_path, **endless).fit(module_with(LoRA(rank=2)), loader(batches(ROWS, 8)))
    with pytest.raises(UserError, match=r"number of steps is not known.*Counting"):
        quiet_trainer(tmp_path, **endless).fit(module_with(Counting(rank=2)), loader(batches(ROWS, 8)))
