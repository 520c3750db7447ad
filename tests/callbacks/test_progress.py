"""Progress as plain lines where there is no terminal."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback

from models import make
from peftlight.callbacks import Progress
from peftlight.callbacks import progress as progress_module
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, Rows, Watch, batches, class_rows, constant, quiet_trainer

pytestmark = QUIET

ROWS = class_rows([5, 9, 4, 12, 3, 6], [0, 1, 2, 1, 0, 2])


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that the test moves."""

    class Clock:
        now = 100.0

        def monotonic(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress_module, "time", clock)
    return clock


class Slow(Callback):
    """Lets each batch take six seconds."""

    def __init__(self, clock: Any) -> None:
        self.clock = clock

    def on_train_batch_start(self, *rest: Any) -> None:
        self.clock.now += 6


def module() -> SequenceClassification:
    return SequenceClassification(make("bert"), LoRA(rank=2), lr_scheduler=constant)


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("step ")]


def test_lines_tell_step_loss_rate_speed_and_time_left(
    seconds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = quiet_trainer(
        tmp_path, [Slow(seconds), Progress()], enable_progress_bar=True, max_epochs=2, limit_val_batches=0
    )
    trainer.fit(module(), Rows(batches(ROWS, 1)))
    shown = capsys.readouterr().out
    lines = lines_of(shown)
    assert [line.partition(":")[0] for line in lines] == [f"step {step}/12" for step in (2, 4, 6, 8, 10, 12)]
    pattern = r"step \d+/12: train_loss \d\.\d+, lr 2\.00e-04, tokens_per_second [\d,]+, (\d+) s left"
    left = [int(re.fullmatch(pattern, line)[1]) for line in lines]  # type: ignore[index]
    assert left == [60, 48, 36, 24, 12, 0]
    assert "\r" not in shown
    assert "\x1b" not in shown


def test_a_line_follows_each_validation_with_its_metrics(
    seconds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = quiet_trainer(tmp_path, [Progress()], enable_progress_bar=True, max_epochs=2, num_sanity_val_steps=1)
    trainer.fit(module(), Rows(batches(ROWS, 2)))
    lines = lines_of(capsys.readouterr().out)
    assert [line.partition(":")[0] for line in lines] == ["step 3/6", "step 6/6"]
    assert all(re.search(r"val_accuracy [\d.]+, val_f1 [\d.]+", line) for line in lines)


def test_a_run_that_goes_on_reckons_with_its_own_steps(
    seconds: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = quiet_trainer(tmp_path, max_epochs=1)
    first.fit(module(), Rows(batches(ROWS, 1)))
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = quiet_trainer(
        tmp_path, [Slow(seconds), Progress()], enable_progress_bar=True, max_epochs=2, limit_val_batches=0
    )
    second.fit(module(), Rows(batches(ROWS, 1)), ckpt_path=tmp_path / "half.ckpt")
    lines = lines_of(capsys.readouterr().out)
    assert [line.rpartition(", ")[2] for line in lines] == ["24 s left", "12 s left", "0 s left"]


def test_tokens_per_second_counts_what_is_not_padding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves by one second at every look, each step shows its number of tokens."""
    ticks = itertools.count()
    clock = type("", (), {"monotonic": staticmethod(lambda: next(ticks))})
    monkeypatch.setattr("peftlight.tasks.token_rate.time", clock)
    speeds = []

    class Speeds(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if "tokens_per_second" in trainer.callback_metrics:
                speeds.append(float(trainer.callback_metrics["tokens_per_second"]))

        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            speeds.append(float(trainer.callback_metrics["tokens_per_second"]))

    quiet_trainer(tmp_path, [Speeds()], accumulate_grad_batches=2).fit(module(), Rows(batches(ROWS, 2)))
    assert speeds[-1] == 3 + 6
    assert 5 + 9 + 4 + 12 in speeds


def test_tokens_per_second_leaves_the_time_of_a_validation_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one within an epoch."""
    ticks, watch = itertools.count(), Watch()
    clock = type("", (), {"monotonic": staticmethod(lambda: next(ticks))})
    monkeypatch.setattr("peftlight.tasks.token_rate.time", clock)

    class Slowly(Callback):
        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            assert len([next(ticks) for _ in range(1000)]) == 1000

    quiet_trainer(tmp_path, [Slowly(), watch], val_check_interval=1).fit(module(), Rows(batches(ROWS, 2)))
    assert min(logged["tokens_per_second"] for logged in watch.logged[1:]) >= 3


def test_on_a_terminal_a_bar_takes_the_place_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Progress().is_disabled
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert Progress().is_enabled
