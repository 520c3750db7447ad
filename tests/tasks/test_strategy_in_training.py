"""What a strategy asks of a training: its hooks at the right moment, also when the training is taken up again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from models import make
from peftlight import Adapter, PEFTStrategy
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA, LoRA, PromptTuning
from peftlight.strategy import Material
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, loader, quiet_trainer, trained

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]
ROWS = class_rows([5, 7, 4, 6, 5, 7, 4, 6, 5, 7, 4, 6], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])


def module_with(strategy: PEFTStrategy) -> SequenceClassification:
    return SequenceClassification(make("bert"), strategy, num_labels=3)


def adalora() -> AdaLoRA:
    return AdaLoRA(init_r=6, target_r=3, target_modules="attention", initial_phase=2, final_phase=3)


@pytest.mark.parametrize("at", [3, 5, 6])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_checkpoint_that_a_callback_saved_resumes_to_the_same_ranks(
    at: int, accumulated: int, tmp_path: Path
) -> None:
    """The callback saves right after the optimizer step: what AdaLoRA did in that step must be in the file."""
    made, settings = batches(ROWS, 2), {"max_epochs": 4, "accumulate_grad_batches": accumulated}
    settings |= {"enable_checkpointing": True, "limit_train_batches": len(made)}

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1, monitor=None)

    whole, again = module_with(adalora()), module_with(adalora())
    quiet_trainer(tmp_path, [saving()], **settings).fit(whole, loader(made))
    file = tmp_path / f"step={at}.ckpt"
    quiet_trainer(tmp_path, [saving()], **settings).fit(again, loader(made), ckpt_path=file, weights_only=True)
    steps_of_epoch = len(made) // accumulated
    if at % steps_of_epoch == 0:  # only there do the same rows follow
        for name, value in trained(whole.model).items():
            assert torch.equal(trained(again.model)[name], value), name
        for site, delta in whole.adapter.sites.items():
            assert torch.equal(again.adapter.sites[site].mask, delta.mask)
    assert sum(int(delta.mask.sum()) for delta in again.adapter.sites.values()) == 3 * len(again.adapter.sites)


@dataclass
class _Prepared(PEFTStrategy):
    """Writes down how often it was shown the data."""

    seen: list[int] = field(default_factory=list)

    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [("bert.encoder.layer.0.output.dense", _Scale())]

    def prepare(self, adapter: Adapter, material: Material) -> None:
        self.seen.append(sum(len(batch["input_ids"]) for batch in material.batches()))

    def penalty(self, adapter: Adapter) -> Tensor | None:
        found = [p for name, p in adapter.parameters().items() if name.endswith("only_penalized")]
        return found[0].square().sum() if found else None


class _Scale(Delta):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(32))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y * self.l


class _Penalized(_Scale):
    def __init__(self) -> None:
        super().__init__()
        self.only_penalized = nn.Parameter(torch.ones(3))


@dataclass
class _WithADeadTensor(_Prepared):
    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [("bert.encoder.layer.0.output.dense", _Penalized())]


def test_a_validation_before_the_fit_does_not_take_the_strategys_look_at_the_data(tmp_path: Path) -> None:
    module = module_with(_Prepared())
    made = loader(batches(ROWS, 2))
    quiet_trainer(tmp_path).validate(module, made, verbose=False)
    assert module.strategy.seen == []
    quiet_trainer(tmp_path).fit(module, made)
    quiet_trainer(tmp_path).fit(module, made)
    assert module.strategy.seen == [len(ROWS)]


def test_the_strategys_look_at_the_data_does_not_change_the_random_numbers(tmp_path: Path) -> None:
    ends = []
    for strategy in (LoRA(rank=2), LoRA(rank=2, init_lora_weights="eva")):
        torch.manual_seed(5)
        quiet_trainer(tmp_path, max_steps=1).fit(module_with(strategy), loader(batches(ROWS, 4)))
        ends.append(torch.rand(1))
    assert torch.equal(*ends)


def test_a_tensor_that_only_the_penalty_reaches_is_dead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"had no gradient in the first step: .*only_penalized"):
        quiet_trainer(tmp_path).fit(module_with(_WithADeadTensor()), loader(batches(ROWS, 2)))


class _Summary:
    def __init__(self, longest: int) -> None:
        self.longest = longest


def test_rows_too_long_for_the_prompt_are_refused_before_the_first_step(tmp_path: Path) -> None:
    data: Any = Rows(batches(ROWS, 2), tokenizer=None)
    data.summaries, data.max_length = {"train": _Summary(36), "validation": _Summary(90)}, 38
    module, trainer = module_with(PromptTuning(4)), quiet_trainer(tmp_path)
    words = r"Rows of 38 tokens and 4 virtual tokens need 42 positions, .* has 40\. Cut rows to 36 tokens .*or set num"
    with pytest.raises(UserError, match=words):
        trainer.fit(module, datamodule=data)
    assert trainer.global_step == 0
    data.max_length = 36
    quiet_trainer(tmp_path).fit(module, datamodule=data)


def test_a_run_without_an_end_is_all_right_where_nothing_plans_by_it(tmp_path: Path) -> None:
    module = SequenceClassification(make("bert"), LoRA(rank=2), num_labels=3,
                                    lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0))  # fmt: skip
    trainer = quiet_trainer(tmp_path, max_epochs=-1, max_time={"seconds": 1})
    trainer.fit(module, loader(batches(ROWS, 2)))
    assert trainer.global_step > 0
