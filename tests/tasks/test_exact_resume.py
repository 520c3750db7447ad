"""A training taken up from a checkpoint, saved at whatever moment, is bit for bit the undisturbed one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from torch.optim import AdamW
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from models import make
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA, Full, LoRA, Stack
from peftlight.tasks import PEFTModule, SequenceClassification
from tasks.resuming import ROWS, Ours, Result, Theirs, same, train
from tasks.small import QUIET, constant, padded

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*overfit_batches"),
    pytest.mark.filterwarnings("ignore:EVA used all"),
    pytest.mark.filterwarnings("ignore:.*reload_dataloaders_every_n_epochs"),
]


class Stream(IterableDataset[Any]):
    """The rows in random order, without a length."""

    def __iter__(self) -> Any:
        return iter([ROWS[row] for row in torch.randperm(len(ROWS)).tolist()])


class Streamed(Theirs):
    """A user's stream."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Stream(), 3, collate_fn=padded)


def on_plateau(strategy: Any) -> PEFTModule:
    """The schedule moves each time, for nothing is improvement enough."""
    schedule = partial(ReduceLROnPlateau, patience=0, threshold=10.0)
    return SequenceClassification(make("bert", 0.1), strategy, optimizer=partial(AdamW, lr=0.05), lr_scheduler=schedule)


def quick(strategy: Any) -> PEFTModule:
    """A learning rate at which ranks differ soon."""
    return SequenceClassification(make("bert", 0.1), strategy, optimizer=partial(AdamW, lr=0.05))


def steady(strategy: Any) -> PEFTModule:
    """A learning rate that does not hang on the number of all steps."""
    return SequenceClassification(make("bert", 0.1), strategy, lr_scheduler=constant)


def differences(whole: Result, again: Result, events: int, at_batch_end: bool) -> list[str]:
    """What of a resumed training is not as in the undisturbed one, of which `events` had happened before."""
    rest = whole.events[events:]
    if at_batch_end and rest and rest[0][0] == "logged":  # Lightning logs the step after the callbacks had their turn
        rest = rest[1:]
    pairs = {
        "trained tensors": (whole.trained, again.trained),
        "optimizer": (whole.optimizer, again.optimizer),
        "schedules": (whole.schedules, again.schedules),
        "random states": (whole.random, again.random),
        "rows, validations, logged values": (rest, again.events),
    }
    return [name for name, (one, other) in pairs.items() if not same(one, other)]


def check_moments(folder: Path, every: int, **training: Any) -> None:
    whole, saved = train(folder, save=folder, **training)
    assert len(saved) >= 7
    found = {
        name: differences(whole, train(folder, folder / f"{name}.ckpt", **training)[0], events, "batch" in name)
        for name, events in [*list(saved.items())[::every], list(saved.items())[-1]]
    }
    assert not {name: differing for name, differing in found.items() if differing}


def adalora() -> AdaLoRA:
    return AdaLoRA(init_r=4, target_r=2, dropout=0.1, initial_phase=2, final_phase=2, interval=2)


QUICK: dict[str, dict[str, Any]] = {
    "accumulating with validations between": {"accumulate_grad_batches": 2, "val_check_interval": 2},
    "a user's own loader": {"data": Theirs, "accumulate_grad_batches": 2},
}
MORE: dict[str, dict[str, Any]] = {
    "epochs": {},
    "steps": {"max_epochs": -1, "max_steps": 8},
    "steps before epochs, windows cut short": {"accumulate_grad_batches": 3, "max_steps": 5, "max_epochs": 3},
    "steps that end with a validation": {"val_check_interval": 2, "max_steps": 9, "max_epochs": None},
    "a share of the epoch": {"val_check_interval": 0.4, "accumulate_grad_batches": 2},
    "limited batches": {"limit_train_batches": 3},
    "validation every other epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "validation across epochs": {"check_val_every_n_epoch": None, "val_check_interval": 3, "max_epochs": 3},
    "no validation": {"limit_val_batches": 0},
    "overfitting": {"overfit_batches": 2, "max_epochs": 3},
    "new loaders": {"reload_dataloaders_every_n_epochs": 2, "max_epochs": 3},
    "a sanity check": {"num_sanity_val_steps": 2},
    "logging now and then": {"log_every_n_steps": 2, "gradient_clip_val": 0.1},
    "plateau": {"module": on_plateau, "max_epochs": 4},
    "plateau by steps": {"module": on_plateau, "max_epochs": 4, "max_steps": 18},
    "workers": {"data": lambda: Ours(source="", batch_size=3, num_workers=2)},
    "a user's loader with workers": {"data": lambda: Theirs(num_workers=2), "val_check_interval": 2},
    "a user's generator": {"data": lambda: Theirs(generator=5)},
    "a stream": {"data": Streamed, "module": steady},
    "AdaLoRA": {"strategy": adalora, "module": quick, "max_epochs": 3},
    "PiSSA": {"strategy": lambda: LoRA(rank=2, init_lora_weights="pissa", dropout=0.1)},
    "EVA": {"strategy": lambda: LoRA(rank=2, init_lora_weights="eva", dropout=0.1)},
    "all parameters": {"strategy": Full},
    "a stack": {"strategy": lambda: Stack([LoRA(rank=2, dropout=0.1), adalora()]), "module": quick, "max_epochs": 3},
}


@pytest.mark.parametrize("name", QUICK)
def test_a_training_goes_on_from_every_moment(name: str, tmp_path: Path) -> None:
    check_moments(tmp_path, 1, **QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_a_training_of_any_kind_goes_on(name: str, tmp_path: Path) -> None:
    check_moments(tmp_path, 3, **MORE[name])  # 3: after batches, validations and epochs in turn


def test_a_training_that_was_to_stop_early_stops_where_it_would_have(tmp_path: Path) -> None:
    """Its decision is in the checkpoint: a run killed after it must not go on for longer."""

    def run(**options: Any) -> tuple[Result, dict[str, int]]:
        stopping = EarlyStopping("val_loss", patience=1, min_delta=10.0)
        return train(tmp_path, callbacks=[stopping], max_epochs=5, val_check_interval=2, module=steady, **options)

    whole, saved = run(save=tmp_path)
    name = next(name for name in reversed(saved) if "validation_end" in name)
    assert sum(event[0] == "validation" for event in whole.events) == 2
    again, _ = run(resumed=tmp_path / f"{name}.ckpt")
    assert same(whole.trained, again.trained)


def test_a_resumed_training_can_be_resumed(tmp_path: Path) -> None:
    """In the same epoch, of a loader that has to be drawn from its beginning each time."""
    options: dict[str, Any] = {"data": Theirs, "accumulate_grad_batches": 2, "val_check_interval": 2}
    whole, _ = train(tmp_path, save=tmp_path, **options)
    second = tmp_path / "second"
    second.mkdir()
    _, saved = train(tmp_path, tmp_path / "00_batch_end.ckpt", save=second, **options)
    for name in list(saved)[:4]:
        again, _ = train(tmp_path, second / f"{name}.ckpt", **options)
        assert same(whole.trained, again.trained), name
        assert same(whole.random, again.random), name


class Interrupt(Callback):
    """Breaks the training off at a batch: by asking it to stop, or by an error before the batch or in a validation."""

    def __init__(self, batch: int, how: str) -> None:
        self.batch, self.how = batch, how

    def _fail(self, trainer: Trainer, how: str) -> None:
        if how == self.how and trainer.fit_loop.total_batch_idx + 1 >= self.batch:
            raise KeyError(how)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        trainer.should_stop = self.how == "stop" and trainer.fit_loop.total_batch_idx + 1 == self.batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._fail(trainer, "error")

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self._fail(trainer, "error in validation")


class SaveAtTheEnd(Checkpoint):
    """Saves when the training ends, however it does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.path)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["stop", "error", "error in validation", "steps"])
@pytest.mark.parametrize("options", [{"val_check_interval": 2}, {"accumulate_grad_batches": 2, "max_steps": 5}])
def test_a_training_broken_off_goes_on_in_the_middle_of_its_epoch(
    how: str, options: dict[str, Any], tmp_path: Path
) -> None:
    def trained_on(result: Result) -> list[Any]:
        return [event for event in result.events if event[0] == "rows"]

    def logged_in(result: Result) -> list[Any]:
        return [event for event in result.events if event[0] == "logged" and "train_loss" in event[2]]

    whole, _ = train(tmp_path, module=steady, **options)
    for batch in (1, 2, 3, 5, 6):
        path, limits = tmp_path / f"{batch}.ckpt", {"max_steps": batch - 1} if how == "steps" else {}
        if how == "steps" and not 0 < batch - 1 < 5:
            continue
        callbacks = [Interrupt(batch, how), SaveAtTheEnd(path)]
        try:
            train(tmp_path, callbacks=callbacks, module=steady, enable_checkpointing=True, **{**options, **limits})
        except KeyError:
            assert how.startswith("error")
        again, _ = train(tmp_path, path, module=steady, **options)
        assert same(
            [whole.trained, whole.optimizer, whole.schedules], [again.trained, again.optimizer, again.schedules]
        )
        assert same(whole.random, again.random)
        for events in (trained_on, logged_in):
            before = len(events(whole)) - len(events(again))
            assert same(events(whole)[before:], events(again)), batch


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    train(tmp_path, save=tmp_path, accumulate_grad_batches=2)
    return tmp_path / "00_batch_end.ckpt"


def changed(path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


def test_other_processes_are_refused(checkpoint: Path) -> None:
    def of_two(content: dict[str, Any]) -> None:
        content["random_states"] *= 2

    with pytest.raises(UserError, match=r"with 2 processes, and here there are 1. It holds gradients of each"):
        train(checkpoint.parent, changed(checkpoint, of_two))
    boundary = changed(checkpoint.parent / "01_batch_end.ckpt", of_two)
    with pytest.raises(UserError, match=r"with 2 processes, and here there are 1. Start as many: set trainer.devices"):
        train(checkpoint.parent, boundary)

    def allowing(strategy: Any) -> PEFTModule:
        module = steady(strategy)
        module.allow_changes = {"processes"}
        return module

    train(checkpoint.parent, boundary, module=allowing)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint")
def test_a_checkpoint_from_elsewhere_says_that_it_goes_on_inexactly(checkpoint: Path) -> None:
    path = changed(checkpoint.parent / "01_batch_end.ckpt", lambda content: content.pop("random_states"))
    with pytest.warns(UserWarning, match="The checkpoint holds no random states"):
        train(checkpoint.parent, path)


def test_a_checkpoint_of_weights_holds_no_more(tmp_path: Path) -> None:
    class Weights(Checkpoint):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "w.ckpt", weights_only=True)

    train(tmp_path, callbacks=[Weights()], enable_checkpointing=True, max_epochs=1)
    content = torch.load(tmp_path / "w.ckpt", weights_only=True)
    assert not {"random_states", "window", "progress", "loader_states"} & set(content)
