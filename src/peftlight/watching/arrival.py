"""The time until all processes have come: they wait for each other in torch, where they hear nothing else."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from subprocess import Popen
from typing import Any

import torch.distributed as dist

_PATIENCE = 3.0
"""Seconds in which the main thread, if it does not wait there, ends by itself."""


class Arrival:
    """Has SIGTERM and Ctrl-C end this process even while it waits for another one, that may never come.

    Python calls handlers in the main thread alone, once it is back from torch; so another thread hears of them too. The
    processes that this one has started end with it, as they would wait for it.
    """

    def __init__(self, started: Sequence[Popen[Any]]) -> None:
        """To be called in the main thread.

        Args:
            started: the processes that this one has started.
        """
        self._started = started
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._over = False
        threading.Thread(target=self._hear, name="peftlight-arrival", daemon=True).start()

    def over(self) -> None:
        """All have come."""
        if not self._over:
            self._over = True
            signal.set_wakeup_fd(self._before)
            self._mouth.close()

    def failed(self) -> None:
        """The main thread ends by itself."""
        self.over()
        self._end_others()

    def _hear(self) -> None:
        while number := self._ear.recv(1):
            if number[0] in (signal.SIGTERM, signal.SIGINT):
                self._end(number[0])
        self._ear.close()

    def _end(self, number: int) -> None:
        time.sleep(_PATIENCE)
        if self._over or dist.is_initialized():
            return
        self._end_others()
        print(f"peftlight: ended by {signal.Signals(number).name}, before all processes had come", file=sys.stderr)
        sys.stderr.flush()
        os._exit(128 + number)

    def _end_others(self) -> None:
        if not dist.is_initialized():  # else they are told by the relay
            for process in self._started:
                process.terminate()
