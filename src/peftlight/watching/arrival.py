"""The time until all processes have come: they wait for each other in torch, where they hear nothing else."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from subprocess import Popen
from typing import Any

import torch.distributed as dist

from peftlight.errors import listed
from peftlight.watching.early import EarlyNews, has_early_news
from peftlight.watching.news import News, stream

_PATIENCE = 3.0
"""Seconds in which the main thread, if it does not wait there, ends by itself."""
_USUAL = 4.0
"""Seconds in which all come when all is well."""
_LONG = 60.0
"""Seconds of waiting after which it is said for whom."""


class Arrival:
    """Has this process end while it waits for another one that may never come: by a signal, or when that one failed.

    Python calls handlers in the main thread alone, once it is back from torch; so another thread hears of them too. The
    processes that this one has started end with it, as they would wait for it.
    """

    def __init__(
        self, process: int, speaks: bool, started: Sequence[Popen[Any]], at_end: Callable[[], object] = lambda: None
    ) -> None:
        """To be called in the main thread.

        Args:
            process: the number of this process.
            speaks: whether it says for its machine that it waits.
            started: the processes that this one has started.
            at_end: called before this process is ended here.
        """
        self._process, self._speaks, self._started, self._at_end = process, speaks, started, at_end
        self._began, self._said = time.monotonic(), False
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._over = threading.Event()
        for action in (self._hear, self._wait):
            threading.Thread(target=action, name="peftlight-arrival", daemon=True).start()

    def over(self) -> None:
        """All have come."""
        if not self._over.is_set():
            self._over.set()
            signal.set_wakeup_fd(self._before)
            self._mouth.close()

    def failed(self) -> None:
        """The main thread ends by itself."""
        self.over()
        self._end_others()

    # ---- signals

    def _hear(self) -> None:
        while number := self._ear.recv(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                self._end(number[0])
        self._ear.close()

    def _end(self, number: int) -> None:
        if self._over.wait(_PATIENCE) or dist.is_initialized():
            return
        print(f"peftlight: ended by {signal.Signals(number).name}, before all processes had come", file=sys.stderr)
        self._leave(128 + number)

    # ---- the others

    def _wait(self) -> None:
        if self._over.wait(_USUAL) or dist.is_initialized():
            return
        with suppress(RuntimeError):  # the store cannot be reached, or is gone with its machine
            self._listen(EarlyNews() if has_early_news() else None)
        self._listen(None)

    def _listen(self, early: EarlyNews | None) -> None:
        if early is not None:
            early.come()
        while not self._over.wait(0.5) and not dist.is_initialized():
            if early is not None and (news := early.heard()) is not None:
                self._follow(early, news)
            if not self._said and time.monotonic() - self._began > _LONG:
                self._said = True
                self._say(early.missing() if early is not None else [])

    def _follow(self, early: EarlyNews, news: News) -> None:
        if news.stream != stream():  # else it stands there already
            print(f"peftlight: error: {news.told()}", file=sys.stderr)
        with suppress(RuntimeError):
            early.end()
        self._leave(news.code)

    def _say(self, missing: Sequence[int]) -> None:
        if self._speaks:
            named = f"{'process' if len(missing) == 1 else 'processes'} {listed(missing)}"
            whom = named if missing else "the other processes"
            print(f"peftlight: process {self._process} has waited for a minute until all are there, and waits on for "
                  f"{whom}: see what is said there. Ctrl-C ends this one.", file=sys.stderr)  # fmt: skip

    def _leave(self, code: int) -> None:
        self._end_others()
        with suppress(Exception):  # whatever happens now, it is not what the run failed by
            self._at_end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def _end_others(self) -> None:
        if not dist.is_initialized():  # else they are told by the relay
            for process in self._started:
                process.terminate()
