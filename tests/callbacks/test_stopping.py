"""Trainings that are asked to end, by real signals and by the clock: in this process, and on the command line."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.plugins.environments import SLURMEnvironment

import forked
from callbacks.commanded import command, recorded, wait_for
from peftlight.callbacks import Checkpoints, Stopping
from peftlight.checkpoint_files import AtomicCheckpoints, read_checkpoint
from peftlight.signals import Stopped
from processes.ranks import Ranks
from tasks.resuming import Result, Theirs, same, train
from tasks.small import QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:The number of training batches")]
HEARD = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


class At(Callback):
    """Does something at a step: at the beginning of its batch, or of a batch of the validation after it."""

    def __init__(self, step: int, act: Callable[[], object], validation: bool = False) -> None:
        self.step, self.act, self.validation = step, act, validation

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and not self.validation:
            self.act()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.global_step == self.step and batch_idx == 0 and self.validation:
            self.act()


def fit(folder: Path, *callbacks: Callback, resumed: Path | None = None, **options: Any) -> Result:
    """Ten optimizer steps in two epochs, with a validation after the fifth and the tenth."""
    own = [Stopping(), Checkpoints(folder / "checkpoints"), *callbacks]
    settings = {"enable_checkpointing": True, "plugins": [AtomicCheckpoints()], **options}
    return train(folder, resumed, callbacks=own, **settings)[0]


def raised(number: int) -> Callable[[], object]:
    return lambda: signal.raise_signal(number)


def assert_goes_on(folder: Path, whole: Result, **options: Any) -> None:
    """What is trained from the checkpoint on comes to what the whole training came to."""
    found = fit(folder, resumed=folder / "checkpoints" / "last.ckpt", **options)
    for part in ("trained", "optimizer", "schedules", "random"):
        assert same(getattr(found, part), getattr(whole, part)), part
    assert found.events[-3:] == whole.events[-3:]


@pytest.mark.parametrize("number", HEARD)
def test_a_signal_ends_a_training_after_the_step_with_a_checkpoint_and_its_own_exit_code(
    tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(each) for each in HEARD]
    whole, run = fit(tmp_path / "whole"), tmp_path / "my run"
    with pytest.raises(Stopped) as stopped:
        fit(run, At(3, raised(number)))
    assert stopped.value.code == 128 + number
    assert [signal.getsignal(each) for each in HEARD] == before
    name = signal.Signals(number).name
    told = capfd.readouterr()
    assert f"ended by {name} at step 4; the checkpoint is {run}/checkpoints/last.ckpt" in told.out
    assert f"to go on: peftlight fit --resume '{run}'\n" in told.out
    assert told.err.count(f"{name}: saving a checkpoint and ending") == 1
    assert_goes_on(run, whole)


def test_within_a_window_of_micro_batches_the_optimizer_step_is_awaited(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        fit(tmp_path, At(1, raised(signal.SIGTERM)), accumulate_grad_batches=3)
    found = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert (found["global_step"], found["window"]) == (2, None)


@pytest.mark.parametrize("data", [None, lambda: Theirs()], ids=["ours", "theirs"])
def test_a_validation_is_broken_off_and_repeated_as_a_whole_however_often(tmp_path: Path, data: Any) -> None:
    options = {} if data is None else {"data": data}
    whole = fit(tmp_path / "whole", **options)
    for resumed in (None, tmp_path / "checkpoints" / "last.ckpt"):
        with pytest.raises(Stopped):
            fit(tmp_path, At(5, raised(signal.SIGTERM), validation=True), resumed=resumed, **options)
    assert_goes_on(tmp_path, whole, **options)


def test_a_second_ctrl_c_ends_at_once_but_not_the_same_one_passed_on(tmp_path: Path) -> None:
    def press() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.1)
        pressed.append(1)
        signal.raise_signal(signal.SIGINT)
        pressed.append(2)

    pressed: list[int] = []
    with pytest.raises(SystemExit) as ended:  # Lightning's, for the KeyboardInterrupt
        fit(tmp_path, At(3, press))
    assert pressed == [1]
    assert not isinstance(ended.value, Stopped)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_with_another_checkpoint_callback_it_is_saved_beside_those(tmp_path: Path) -> None:
    own = [Stopping(), ModelCheckpoint(tmp_path / "mine", every_n_epochs=2), At(3, raised(signal.SIGTERM))]
    with pytest.raises(Stopped):
        train(tmp_path, callbacks=own, enable_checkpointing=True)
    assert os.listdir(tmp_path / "mine") == ["interrupted.ckpt"]


def test_without_checkpoints_it_ends_without_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Stopped):
        train(tmp_path, callbacks=[Stopping(), At(3, raised(signal.SIGTERM))])
    assert "no checkpoint was asked for" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.fixture
def an_hour_passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """What lets Lightning's clock go on by an hour."""
    passed: list[None] = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * len(passed))
    monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", clock)
    return lambda: passed.append(None)


def test_a_time_limit_ends_the_fit_without_an_error_and_a_longer_one_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], an_hour_passes: Callable[[], None]
) -> None:
    whole = fit(tmp_path / "whole")
    fit(tmp_path, At(3, an_hour_passes), max_time={"hours": 1})
    told = capsys.readouterr().out
    assert "ended by its time limit at step 4" in told
    assert f"--resume {tmp_path} --trainer.max_time LONGER" in told
    found = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert (found["global_step"], found["epoch"]) == (4, 0)
    assert_goes_on(tmp_path, whole, max_time={"hours": 2})


def test_a_limit_that_is_over_trains_nothing_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], an_hour_passes: Callable[[], None]
) -> None:
    fit(tmp_path, At(3, an_hour_passes), max_time={"hours": 1})
    again = fit(tmp_path, resumed=tmp_path / "checkpoints" / "last.ckpt", max_time={"hours": 1})
    assert {event[0] for event in again.events} == {"validation", "logged"}  # of what the adapter holds
    assert "the time limit counts the whole training, and is over" in capsys.readouterr().out


def test_a_timer_that_looks_at_the_end_of_epochs_ends_there(tmp_path: Path, an_hour_passes: Callable[[], None]) -> None:
    fit(tmp_path, Timer({"hours": 1}, interval="epoch"), At(3, an_hour_passes))
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 5


def test_that_slurm_does_not_requeue_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for requeue in (True, False):
        environment = SLURMEnvironment(auto_requeue=requeue)
        trainer: Any = SimpleNamespace(strategy=SimpleNamespace(cluster_environment=environment), callbacks=[])
        stopping = Stopping()
        stopping.setup(trainer, None, "fit")  # type: ignore[arg-type]
        stopping.teardown(trainer, None, "fit")  # type: ignore[arg-type]
        assert ("does not put itself back into SLURM's queue" in capsys.readouterr().out) == requeue


# ---- the command line


@pytest.mark.slow
def test_the_command_ends_interrupted_and_is_resumed_to_the_same_bytes(tmp_path: Path, encoder: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    process = forked.start(command(folder, encoder), folder)
    wait_for(folder / "held0")
    os.kill(process.pid or 0, signal.SIGTERM)
    (folder / "go").touch()
    forked.join(process)
    said = (folder / "out.txt").read_text()
    assert process.exitcode == 128 + signal.SIGTERM, said
    assert "peftlight: ended by SIGTERM" in said
    found = recorded(folder)
    assert (found["state"], found["steps"], found["steps_planned"]) == ("interrupted", 4, 12)
    assert "error" not in found
    assert not (found["run"] / "adapter").exists()
    code, said = forked.peftlight(["fit", "--resume", found["run"]], folder)
    assert code == 0, said
    (whole / "go").parent.mkdir()
    (whole / "go").touch()
    code, said = forked.peftlight(command(whole, encoder), whole)
    assert code == 0, said
    adapters = [(recorded(each)["run"] / "adapter" / "adapter_model.safetensors") for each in (whole, folder)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_training_it_ends_at_once_and_leaves_nothing(tmp_path: Path, encoder: Path, number: int) -> None:
    process = forked.start(command(tmp_path, encoder, "setup"), tmp_path)
    wait_for(tmp_path / "held0")
    os.kill(process.pid or 0, number)
    forked.join(process)
    assert process.exitcode == 128 + number, (tmp_path / "out.txt").read_text()
    assert not list((tmp_path / "runs").iterdir())
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_time_limit_is_recorded_and_the_adapter_written(tmp_path: Path, encoder: Path) -> None:
    slow = command(tmp_path, encoder, "every step", **{"trainer.max_time": "00:00:00:01"})
    code, said = forked.peftlight(slow, tmp_path)
    assert code == 0, said
    found = recorded(tmp_path)
    assert (found["state"], found["steps_planned"]) == ("stopped by max_time", 12)
    assert 0 < found["steps"] < 12
    assert (found["run"] / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("where", "step"), [("step", 5), ("validation", 6)])
def test_a_signal_to_one_of_several_processes_ends_all_at_the_same_step(
    tmp_path: Path, encoder: Path, where: str, step: int
) -> None:
    """The first one needs longer for its last words than the others: its logger carries the checkpoint away."""
    options = {"trainer.strategy": "ddp", "trainer.logger": "holding.Slow"}
    ranks = Ranks(2, command(tmp_path, encoder, where, **options), tmp_path)
    wait_for(tmp_path / "held0", tmp_path / "held1")
    os.kill(ranks.processes[1].pid or 0, signal.SIGTERM)
    (tmp_path / "go").touch()
    assert ranks.ended() == [128 + signal.SIGTERM, 0], ranks.said()  # 0: as started by Lightning
    found = recorded(tmp_path)
    assert found["state"] == "interrupted"
    checkpoint = read_checkpoint(found["run"] / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == found["steps"] == step
    assert checkpoint["callbacks"]["Hold"] == {"batches": step}, "the user's callback had its turn"


def test_a_time_limit_within_a_validation_lets_it_come_to_its_end_which_is_the_last(
    tmp_path: Path, an_hour_passes: Callable[[], None]
) -> None:
    whole = fit(tmp_path / "whole")
    ended = fit(tmp_path, At(5, an_hour_passes, validation=True), max_time={"hours": 1})
    assert [event for event in ended.events if event[0] == "validation"] == [("validation", 5)]
    assert_goes_on(tmp_path, whole, max_time={"hours": 2})
