"""When one process fails or is lost, all of them end, with its error on every terminal."""

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from peftlight.signals import StoppedTogether
from peftlight.watching.arrival import Arrival
from peftlight.watching.at_exit import end_group_at_exit
from peftlight.watching.link import Link
from peftlight.watching.news import News, news_of, stream

_ALIKE = 1.5
"""Seconds in which other processes may meet the same error by themselves."""
_LINGER = 2.0
"""Seconds for which a failed process stays: the launcher kills the others once it has gone."""
_AFTERMATH = 3.0
"""Seconds in which a broken collective is explained by the loss of a process."""
_ENDING = 10.0
"""Seconds after which a process that cannot end by itself is ended."""
_runs = itertools.count()


class OtherProcessFailed(Exception):
    """This process ends because another one has failed or is lost."""


def keep_watch(trainer: Trainer) -> None:
    """Watch over this run of the trainer if it has several processes. To be called in each, before they meet."""
    if trainer.world_size == 1:
        return
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, Watch) for callback in callbacks):
        callbacks.insert(0, Watch())  # first: it judges an error before others record it
    for callback in callbacks:
        if isinstance(callback, Watch):
            callback.begin(trainer)


class Watch(Callback):
    """Tells the other processes when this one fails, and ends this one when another fails or is lost.

    The main thread may wait in a collective that nothing ends any more. So another thread prints the cause, calls
    `at_end` with it, and ends the process with the exit code of the one that failed. While all is well nothing is sent.
    """

    def __init__(self) -> None:
        self.at_end: Callable[[OtherProcessFailed], object] = lambda error: None
        self._link: Link | None = None
        self._arrival: Arrival | None = None

    def begin(self, trainer: Trainer) -> None:
        """Start to watch over one run of the trainer."""
        self._trainer = trainer
        self._heard: list[News] = []
        self._told, self._raised, self._own = threading.Event(), threading.Event(), ""
        self._link = Link(f"watch {next(_runs)}", trainer.global_rank, trainer.num_nodes == 1, self._hear)
        if threading.current_thread() is threading.main_thread():
            started = getattr(trainer.strategy.launcher, "procs", [])
            error = OtherProcessFailed("before all processes had come")
            at_end = partial(self.at_end, error)
            self._arrival = Arrival(trainer.global_rank, trainer.local_rank == 0, started, at_end)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._arrival is not None:
            self._arrival.over()
            self._arrival = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._link is not None:
            self._link.leave()
            self._link = None
            end_group_at_exit()

    # ---- this process fails

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._arrival is not None:
            _hold_launcher_back()
            self._arrival.failed()
        if self._link is None or not dist.is_initialized():
            return
        if isinstance(exception, StoppedTogether):
            self._leave()  # the others end by themselves, however long their last words take
            return
        own = news_of(exception, trainer.global_rank)
        self._own = own.text
        self._raised.set()
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, when another process ends a little earlier
        follows = isinstance(exception, RuntimeError) and self._told.wait(_AFTERMATH)
        if not follows and self._link.tell(own):
            self._told.wait(_ENDING)
        _end_within(_ENDING + _LINGER, own.code)
        if isinstance(exception, Exception):  # else a person or the scheduler ends all of them anyway
            self._stay(own)

    def _stay(self, own: News) -> None:
        time.sleep(_LINGER)
        first = self._heard[0] if self._heard else own
        if first.process != own.process and first.text != own.text:
            threading.Event().wait()  # another failed before, and the watching thread is about to end this process
        if any(news.process < own.process and _same_words(news, own) for news in self._heard):
            os._exit(own.code)

    # ---- another one fails: in the link's thread

    def _hear(self, news: News) -> None:
        self._heard.append(news)
        first = not self._told.is_set()
        self._told.set()
        if first and news.process != self._trainer.global_rank:
            threading.Thread(target=self._follow, args=[news], name="peftlight-follow", daemon=True).start()

    def _follow(self, news: News) -> None:
        """End this process as another has ended, unless it ends with the same error by itself."""
        until = time.monotonic() + _LINGER
        if not news.sudden and self._raised.wait(_ALIKE) and self._own == news.text:
            return
        _hold_launcher_back()
        _end_within(_ENDING, news.code)
        assert self._link is not None
        told = news.told() + (_at_the_loss(self._trainer) if news.sudden else "")
        if self._trainer.global_rank == 0 or news.stream != stream():  # else it stands there already
            print(f"peftlight: error: {told}", file=sys.stderr)
        with suppress(Exception):  # whatever happens now, it is not what the run failed by
            self.at_end(OtherProcessFailed(told))
        while time.monotonic() < until or not self._link.others_gone():  # the first process's end is the run's
            time.sleep(0.05)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(news.code)


def _at_the_loss(trainer: Trainer) -> str:
    """Where the training was, and from where it can go on."""
    saved = trainer.ckpt_path or getattr(trainer.checkpoint_callback, "best_model_path", "")
    on = "To go on from the last checkpoint: peftlight fit --resume RUN" if saved else "No checkpoint was written yet."
    return f" This process was at step {trainer.global_step}. {on}"


def _same_words(one: News, other: News) -> bool:
    return one.text == other.text and one.stream == other.stream


def _hold_launcher_back() -> None:
    """Lightning's launcher kills this process once another is gone, whatever it is about to say; it is private."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._run = lambda: True  # type: ignore[attr-defined]  # there is nothing left to observe


def _end_within(seconds: float, code: int) -> None:
    """The last resort where the end itself waits for a process that is no more there."""
    timer = threading.Timer(seconds, os._exit, [code])
    timer.daemon = True
    timer.start()
