"""The checkpoints that a run keeps by itself."""

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from models import make
from peftlight.callbacks import Checkpoints
from peftlight.checkpoint_files import AtomicCheckpoints, newest_whole, read_checkpoint
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from tasks.resuming import same, train
from tasks.small import QUIET, batches, class_rows, constant, loader, quiet_trainer

pytestmark = QUIET
BATCHES = batches(class_rows([5, 9, 4, 12, 6, 7], [0, 1, 2, 1, 0, 2]), 2)


class AtStep(Callback):
    """Calls a function at the beginning of a batch."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self.act()


def fit(folder: Path, *callbacks: Callback, minutes: float = 10.0, **options: Any) -> Trainer:
    torch.manual_seed(0)
    module = SequenceClassification(make("bert", 0.1), LoRA(rank=2), lr_scheduler=constant)
    settings = {"max_epochs": 3, "enable_checkpointing": True, "plugins": [AtomicCheckpoints()], **options}
    trainer = quiet_trainer(folder, [Checkpoints(folder / "kept", minutes), *callbacks], **settings)
    trainer.fit(module, loader(BATCHES))
    return trainer


def step_of(path: Path) -> int:
    return int(read_checkpoint(path)["global_step"])


def test_the_last_two_are_kept_one_for_each_epoch(tmp_path: Path) -> None:
    trainer = fit(tmp_path)
    kept = tmp_path / "kept"
    assert sorted(os.listdir(kept)) == ["last.ckpt", "previous.ckpt"]
    assert (step_of(kept / "last.ckpt"), step_of(kept / "previous.ckpt")) == (9, 6)
    assert trainer.checkpoint_callback.best_model_path == str(kept / "last.ckpt")  # type: ignore[union-attr]


def test_within_an_epoch_there_is_one_every_few_minutes(tmp_path: Path) -> None:
    found: list[int] = []
    fit(tmp_path, AtStep(5, lambda: found.append(step_of(tmp_path / "kept" / "last.ckpt"))), minutes=0.0)
    fit(tmp_path, AtStep(5, lambda: found.append(step_of(tmp_path / "kept" / "last.ckpt"))))
    assert found == [5, 3]


def test_a_fast_dev_run_keeps_none(tmp_path: Path) -> None:
    fit(tmp_path, fast_dev_run=1)
    assert not (tmp_path / "kept").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("done", [0, 1, 2])
def test_whenever_it_ends_there_is_a_whole_one_and_only_one_step_is_lost(
    tmp_path: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the third checkpoint, after so many files have got their names."""
    rename, third, renamed = os.replace, [], []

    def counted(*names: Any) -> None:
        if third and len(renamed) == done:
            raise Killed
        rename(*names)
        renamed.extend(third)

    monkeypatch.setattr(os, "replace", counted)
    with pytest.raises(Killed):
        fit(tmp_path, AtStep(2, lambda: third.append(True)), minutes=0.0)
    assert step_of(newest_whole(tmp_path / "kept")[0]) == (2 if done == 0 else 3)


def test_without_room_the_training_ends_and_the_former_one_stays(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = AtStep(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1])))
    try:
        with pytest.raises(UserError, match=r"No room left to write .*new\.ckpt"):
            fit(tmp_path, fill, minutes=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(os.listdir(tmp_path / "kept")) == ["last.ckpt", "previous.ckpt"]
    assert step_of(newest_whole(tmp_path / "kept")[0]) == 4


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / ".new.ckpt.123.tmp").write_text("half")
    fit(tmp_path, max_epochs=1)
    assert os.listdir(tmp_path / "kept") == ["last.ckpt"]


def test_a_training_goes_on_exactly_from_it_also_in_another_folder(tmp_path: Path) -> None:
    keeping: dict[str, Any] = {"enable_checkpointing": True, "plugins": [AtomicCheckpoints()]}
    whole, _ = train(tmp_path)

    def stop() -> None:
        raise Killed

    with pytest.raises(Killed):
        train(tmp_path, callbacks=[Checkpoints(tmp_path / "kept", 0.0), AtStep(3, stop)], **keeping)
    (tmp_path / "kept").rename(tmp_path / "moved")
    found, _ = train(tmp_path, tmp_path / "moved" / "last.ckpt", callbacks=[Checkpoints(tmp_path / "new")], **keeping)
    assert same(found.trained, whole.trained)
    assert same(found.optimizer, whole.optimizer)
