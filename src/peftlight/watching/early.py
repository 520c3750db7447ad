"""What a process says to the others before all have met: in torchrun's store, which is there before they are."""

import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from peftlight.watching.news import News, news_of

_FAILED = "failed"
_REACHED = timedelta(seconds=20)
"""Time in which a store answers that is there."""
_LINGER = 30.0
"""Seconds within which the others, if they still start, come and hear what has failed."""


class EarlyNews:
    """This process's connection to the store of torchrun that started processes on several machines.

    On one machine it needs none: there torchrun ends all processes once one has failed.
    """

    def __init__(self) -> None:
        """
        Raises:
            RuntimeError: the store cannot be reached; the methods raise it too.
        """
        self.process, self.count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_REACHED)
        self._store = dist.PrefixStore("peftlight early", store)

    def come(self) -> None:
        """Say that this process waits for the others."""
        self._store.set(f"come {self.process}", "")

    def missing(self) -> list[int]:
        """The processes that have not come."""
        return [process for process in range(self.count) if not self._store.check([f"come {process}"])]

    def tell(self, error: Exception) -> None:
        """Say that this process has failed; of several failures, the first is heard."""
        self._store.compare_set(_FAILED, "", news_of(error, self.process).line().decode())

    def heard(self) -> News | None:
        """The failure of a process."""
        return News.of(self._store.get(_FAILED)) if self._store.check([_FAILED]) else None

    def end(self) -> None:
        """Say that this process ends, and with it its machine's launcher; that of the first waits for the others.

        To be called last: the store ends with the first machine's launcher.
        """
        own, count = int(os.environ["GROUP_RANK"]), int(os.environ["GROUP_WORLD_SIZE"])
        self._store.set(f"end {own}", "")
        machines, until = [f"end {machine}" for machine in range(count)], time.monotonic() + _LINGER
        while own == 0 and not self._store.check(machines) and time.monotonic() < until:
            time.sleep(0.2)


def has_early_news() -> bool:
    """Whether there is such a store, and nothing else ends the others: torchrun with restarts starts all anew."""
    names = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS", "LOCAL_WORLD_SIZE", "WORLD_SIZE")
    shared, restarts, here, everywhere = map(os.environ.get, names)
    return shared == "True" and restarts == "0" and here != everywhere and not dist.is_initialized()


def tell_early(error: Exception) -> None:
    """Tell the processes that wait on other machines that this one will not come.

    To be called once the error is said here, as it may wait, and be ended.
    """
    if not has_early_news():
        return
    try:
        early = EarlyNews()
        early.tell(error)
        early.end()
    except RuntimeError as unheard:
        print(f"peftlight: the other machines could not be told ({unheard})", file=sys.stderr)
