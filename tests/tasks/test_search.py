"""Lightning's finders and Tuner: what they find is what trains, as if the training had begun with it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

from models import make
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA, LoRA
from peftlight.strategy import PEFTStrategy
from peftlight.tasks import LinearWarmup, SequenceClassification
from tasks.resuming import ROWS, Ours, Theirs, same, train
from tasks.small import QUIET, padded, quiet_trainer

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode at the start of training"),
]


def rate_finder() -> LearningRateFinder:
    return LearningRateFinder(min_lr=1e-4, max_lr=1, num_training_steps=18)


def size_finder() -> BatchSizeFinder:
    return BatchSizeFinder(init_val=1, max_trials=3, steps_per_trial=1)


def task(strategy: PEFTStrategy, **options: Any) -> SequenceClassification:
    return SequenceClassification(make("bert", 0.1), strategy, **options)


@pytest.mark.parametrize("data", [lambda: Ours(source="", batch_size=3), Theirs], ids=["ours", "theirs"])
@pytest.mark.parametrize(
    "strategy",
    [
        lambda: LoRA(rank=2, dropout=0.2, lora_plus_ratio=4.0),
        lambda: AdaLoRA(init_r=4, target_r=2, initial_phase=2, final_phase=2),
    ],
    ids=["LoRA+", "AdaLoRA"],
)
def test_after_a_search_for_the_rate_the_training_is_the_one_that_begins_with_it(
    strategy: Callable[[], PEFTStrategy], data: Callable[[], LightningDataModule], tmp_path: Path
) -> None:
    tasks: list[SequenceClassification] = []

    def module(strategy: PEFTStrategy, **options: Any) -> SequenceClassification:
        tasks.append(task(strategy, **options))
        return tasks[-1]

    options: dict[str, Any] = {"strategy": strategy, "data": data, "max_epochs": 4}
    searched, _ = train(tmp_path, module=module, callbacks=[rate_finder()], **options)
    found = tasks[0].learning_rate
    assert found is not None
    assert found != 2e-4
    optimizer = partial(torch.optim.AdamW, lr=found)
    begun, _ = train(tmp_path, module=lambda strategy: task(strategy, optimizer=optimizer), **options)
    searched.optimizer["param_groups"] = [_but_defaults(group) for group in searched.optimizer["param_groups"]]
    begun.optimizer["param_groups"] = [_but_defaults(group) for group in begun.optimizer["param_groups"]]
    assert same(vars(searched), vars(begun))
    assert found in searched.schedules[0]["base_lrs"]
    assert list(tmp_path.iterdir()) == []  # Lightning's own checkpoint is gone


def _but_defaults(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "weight_decay"} | {"lr": group["lr"]}


def test_after_a_search_for_the_size_the_training_is_the_one_that_begins_with_it(tmp_path: Path) -> None:
    finder = size_finder()
    searched, _ = train(tmp_path, callbacks=[finder])
    assert finder.optimal_batch_size == 4
    begun, _ = train(tmp_path, data=lambda: Ours(source="", batch_size=4))
    assert same(vars(searched), vars(begun))
    assert searched.schedules[0]["total_steps"] == 2 * 4  # of 14 rows


def test_the_tuner_finds_both_and_leaves_the_training_to_begin_with_them(tmp_path: Path) -> None:
    def trained(tune: bool, rate: float | None, size: int) -> tuple[Any, SequenceClassification, Ours]:
        torch.manual_seed(3)
        module, data = task(LoRA(rank=2, dropout=0.2)), Ours(source="", batch_size=size)
        module.learning_rate = rate
        trainer = quiet_trainer(tmp_path, max_epochs=4)
        if tune:
            tuner = Tuner(trainer)
            assert tuner.scale_batch_size(module, datamodule=data, init_val=1, max_trials=3, steps_per_trial=1) == 4
            found = tuner.lr_find(module, datamodule=data, min_lr=1e-4, num_training=16)
            assert found is not None
            assert module.learning_rate == found.suggestion()
        else:
            module.configure_model()
        torch.manual_seed(4)
        data._seed = None
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == 16
        assert module.adapter is not None
        return module.adapter.state(), module, data

    state, module, data = trained(True, None, 3)
    other, _, _ = trained(False, module.learning_rate, data.batch_size)
    assert same(state, other)


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_size_is_found_for_an_evaluation_too(stage: str, tmp_path: Path) -> None:
    class Sized(Theirs):
        batch_size = 3

        def train_dataloader(self) -> Any:
            return DataLoader(ROWS, batch_size=self.batch_size, collate_fn=padded)

        val_dataloader = test_dataloader = predict_dataloader = train_dataloader

    searched, plain = (
        getattr(quiet_trainer(tmp_path, callbacks), stage)(task(LoRA(rank=2), num_labels=3), Sized())
        for callbacks in ([size_finder()], [])
    )
    if stage == "predict":
        assert [len(batch) for batch in searched] == [4, 4, 4, 2]
        searched, plain = ([row for batch in batches for row in batch] for batches in (searched, plain))
        assert [row["id"] for row in searched] == [row["id"] for row in plain]
        searched, plain = ([row["probabilities"] for row in rows] for rows in (searched, plain))
    assert [pytest.approx(one, abs=1e-6) for one in searched] == plain


def test_a_rate_that_cannot_be_found_is_an_error(tmp_path: Path) -> None:
    finder = LearningRateFinder(num_training_steps=5)
    with pytest.raises(UserError, match="found no learning rate in 5 steps"):
        quiet_trainer(tmp_path, [finder]).fit(task(LoRA(rank=2)), Ours(source="", batch_size=3))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr_scheduler": partial(OneCycleLR, max_lr=0.1, total_steps=20)}, "OneCycleLR sets learning rates"),
        ({"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.0)}, "SGD has no learning rate"),
    ],
    ids=["schedule", "optimizer"],
)
def test_a_found_rate_that_would_change_nothing_is_refused(options: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        quiet_trainer(tmp_path, [rate_finder()], max_epochs=4).fit(
            task(LoRA(rank=2), **options), Ours(source="", batch_size=3)
        )


def test_a_training_that_goes_on_has_its_values(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(task(LoRA(rank=2)), Ours(source="", batch_size=3))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    for finder in (rate_finder(), size_finder()):
        with pytest.raises(UserError, match="nothing to search"):
            quiet_trainer(tmp_path, [finder], max_epochs=3).fit(
                task(LoRA(rank=2)), Ours(source="", batch_size=3), ckpt_path=tmp_path / "last.ckpt"
            )


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_a_search_within_a_training_is_refused(tmp_path: Path) -> None:
    class Later(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            """Not now."""

        def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
            self.lr_find(trainer, pl_module)

    with pytest.raises(UserError, match="comes before the first step"):
        quiet_trainer(tmp_path, [Later()]).fit(task(LoRA(rank=2)), Ours(source="", batch_size=3))


def test_a_strategy_that_begins_with_batches_refuses_others(tmp_path: Path) -> None:
    module = task(LoRA(rank=2, init_lora_weights="eva"))
    with pytest.raises(UserError, match=r"LoRA.*in batches of 3 rows.*found 4: set data.batch_size"):
        quiet_trainer(tmp_path, [size_finder()]).fit(module, Ours(source="", batch_size=3))


def test_a_found_rate_is_the_peak_of_the_schedule(tmp_path: Path) -> None:
    module = task(LoRA(rank=2), lr_scheduler=partial(LinearWarmup, warmup=0.0))
    trainer = quiet_trainer(tmp_path, [rate_finder()], max_epochs=4)
    trainer.fit(module, Ours(source="", batch_size=3))
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [module.learning_rate]
