"""A training that is asked to end saves a checkpoint first: by a signal, or by its time limit."""

import contextlib
import os
import shlex
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.trainer import call
from lightning.pytorch.utilities.exceptions import _TunerExitException

from peftlight.callbacks.checkpoints import Checkpoints
from peftlight.callbacks.wishes import Wishes
from peftlight.console import say
from peftlight.signals import StoppedTogether, give_back, take
from peftlight.tasks import PEFTModule, TaskCallback

TIME_IS_UP = 1
"""Less than any signal's number that is heard, so that a signal goes first."""
_SAME_PRESS = 1.0
"""Seconds within which another Ctrl-C is the same one, passed on by the terminal and by a launcher."""


class Stopping(TaskCallback):
    """Ends a training at the next optimizer step, or within a validation at its next batch, and saves a checkpoint.

    SIGTERM, Ctrl-C, SIGUSR1 and the signal by which SLURM announces its limit end the program with 128 and their number
    as exit code, at once: nothing is validated, and no adapter saved. `Trainer(max_time=...)` ends the fit, which is
    validated and saved as at any end; a validation under way comes to its end first. So it does for a signal where a
    callback has exchanged the weights for it: a checkpoint would hold the wrong ones.

    A signal to any process ends all of them at the same step: they exchange a number at each and learn of it at the
    next, so that none has to wait. A second Ctrl-C ends at once, and so does every signal before the training.
    """

    def __init__(self) -> None:
        self._wish = self._step = self._put_off = 0
        self._common: float = 0
        self._pressed = 0.0
        self._process = os.getpid()
        self._training = False
        self._former: dict[int, Any] = {}
        self._wishes = Wishes()

    # ---- signals

    def before_base(self, trainer: Trainer, module: PEFTModule) -> None:
        if trainer.state.fn == "fit":
            self.setup(trainer, module, "fit")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Comes before the workers of data loaders start, which are to leave Ctrl-C to this process."""
        if stage != "fit" or self._former:
            return
        self._wish, self._process = 0, os.getpid()
        self._listen(trainer)
        if getattr(_environment(trainer), "auto_requeue", False):
            say("this job does not put itself back into SLURM's queue: when SLURM announces its limit, a checkpoint is "
                "saved; peftlight fit --resume goes on from there")  # fmt: skip
        for timer in _timers(trainer, "step"):
            # It would send a message in every batch, and end the epoch as if it were whole.
            timer._check_time_remaining = lambda trainer: None  # type: ignore[method-assign]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._training = False
        give_back(self._former)
        self._former = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "fit")

    def _listen(self, trainer: Trainer) -> None:
        """Lightning's own handlers come between: they would send messages from within a signal, and hang."""
        environment = _environment(trainer)
        asked = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None
        numbers = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, asked or signal.SIGTERM}
        self._former = {**take(self._heard, *numbers), **self._former}

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process and number == signal.SIGINT:
            return  # a data loader's worker goes on until its training ends it
        again = number == self._wish == signal.SIGINT and time.monotonic() - self._pressed > _SAME_PRESS
        if os.getpid() != self._process or not self._training or again:
            signal.signal(number, self._former.get(number) or signal.SIG_DFL)
            signal.raise_signal(number)
            return
        if self._wish == 0:
            self._pressed = time.monotonic()
            with contextlib.suppress(OSError):  # print could be within a print
                os.write(2, f"\n{signal.Signals(number).name}: saving a checkpoint and ending\n".encode())
        self._wish = max(self._wish, number)

    # ---- the places where a training can end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)
        # Lightning puts back what it found when it came, which is this.
        trainer._signal_connector._original_handlers |= self._former
        self._training, self._step = True, trainer.global_step
        self._wishes.start()
        if self._wishes.greatest(_time_is_up(trainer)):
            say("the time limit counts the whole training, and is over: set a longer --trainer.max_time")
            _end_fit(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if wish := self._wish_of_all(trainer):
                self._end(trainer, wish)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training:
            batches = sum(trainer.num_val_batches)
            if not self._wishes.alone:  # a process may have fewer than others; infinite is not known
                batches = -self._wishes.greatest(0 if batches == float("inf") else -int(batches))
            self._common, self._put_off = batches, 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._training and self._common > 0:
            self._common -= 1
            wish = self._wish_of_all(trainer)
            exchanged = isinstance(pl_module, PEFTModule) and pl_module.ending.exchanged
            if wish > TIME_IS_UP and not exchanged:
                self._end(trainer, wish)
            self._put_off = max(self._put_off, wish)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training and self._put_off:
            if isinstance(pl_module, PEFTModule):
                pl_module.ending.validation_ends()  # else it would be done once more
            self._end(trainer, self._put_off)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False
        self._wishes.stop()

    def _wish_of_all(self, trainer: Trainer) -> int:
        return self._wishes.exchange(self._wish or _time_is_up(trainer))

    def _end(self, trainer: Trainer, wish: int) -> NoReturn:
        why = "its time limit" if wish == TIME_IS_UP else signal.Signals(wish).name
        say(f"ended by {why} at step {trainer.global_step}; {_how_to_go_on(_save(trainer), wish)}")
        if wish == TIME_IS_UP:
            _end_fit(trainer)
        started = isinstance(_environment(trainer), LightningEnvironment) and trainer.global_rank > 0
        # Lightning kills the first process, which may still be busy, once one that it started has another code than 0.
        raise StoppedTogether(wish, 0 if started else None)


def _environment(trainer: Trainer) -> Any:
    """Who started the processes, as Lightning sees it."""
    return getattr(trainer.strategy, "cluster_environment", None)


def _end_fit(trainer: Trainer) -> NoReturn:
    """As if the training had been shorter, but without the end of an epoch, which would count it as whole."""
    trainer.should_stop = trainer.training = True
    trainer.fit_loop.on_run_end()
    trainer._teardown()
    call._call_callback_hooks(trainer, "on_fit_end")
    call._call_lightning_module_hook(trainer, "on_fit_end")
    raise _TunerExitException  # Lightning's way out of a fit that neither fails nor goes on


def time_was_up(trainer: Trainer) -> bool:
    """Whether a time limit ended the training, and no other end came first."""
    return trainer.should_stop and _is_over(_timers(trainer, "step", "epoch"))


def _timers(trainer: Any, *intervals: str) -> list[Timer]:
    """Those that look at their limit at these places."""
    return [each for each in trainer.callbacks if isinstance(each, Timer) and each._interval in intervals]


def _time_is_up(trainer: Trainer) -> int:
    return TIME_IS_UP if _is_over(_timers(trainer, "step")) else 0


def _is_over(timers: list[Timer]) -> bool:
    left = [timer.time_remaining() for timer in timers]
    return any(seconds is not None and seconds <= 0 for seconds in left)


def _save(trainer: Trainer) -> Path | None:
    callback = trainer.checkpoint_callback
    if callback is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    if isinstance(callback, Checkpoints):
        return callback.save(trainer)
    folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
    path = Path(folder or trainer.default_root_dir) / "interrupted.ckpt"
    trainer.save_checkpoint(path, weights_only=False)
    return path


def _how_to_go_on(checkpoint: Path | None, wish: int) -> str:
    if checkpoint is None:
        return "no checkpoint was asked for"
    run = checkpoint.parents[1] if checkpoint.parent.name == "checkpoints" else checkpoint
    longer = " --trainer.max_time LONGER" if wish == TIME_IS_UP else ""
    return f"the checkpoint is {checkpoint}\nto go on: peftlight fit --resume {shlex.quote(str(run))}{longer}"
