"""What a process says to the others before all have met: in torchrun's store, which is there before they are."""

import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from peftlight.watching.news import News, news_of

_FAILED = "failed"
_PATIENCE = timedelta(seconds=20)
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
        store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"peftlight early {attempt}", store)

    def come(self) -> None:
        """Say that this process waits for the others."""
        self._store.set(f"come {self.process}", "")

    def missing(self) -> list[int]:
        """The processes that have not come."""
        return [process for process in range(self.count) if not self._store.check([f"come {process}"])]

    def tell(self, error: BaseException) -> None:
        """Say that this process has failed; of several failures, the first is heard."""
        self._store.compare_set(_FAILED, "", news_of(error, self.process).line().decode())

    def heard(self) -> News | None:
        """The failure of a process."""
        return News.of(self._store.get(_FAILED)) if self._store.check([_FAILED]) else None

    def end(self) -> None:
        """Say that this process ends; the store ends with the launcher of the first machine, so there it waits for all.

        To be called last.
        """
        self._store.set(f"end {self.process}", "")
        every, until = [f"end {process}" for process in range(self.count)], time.monotonic() + _LINGER
        while os.environ.get("GROUP_RANK") == "0" and not self._store.check(every) and time.monotonic() < until:
            time.sleep(0.2)


def has_early_news() -> bool:
    """Whether there is such a store."""
    shared, here, every = map(os.environ.get, ("TORCHELASTIC_USE_AGENT_STORE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    return shared == "True" and here != every and not dist.is_initialized()


def tell_early(error: BaseException) -> None:
    """Tell the processes that wait on other machines that this one will not come."""
    if not has_early_news():
        return
    try:
        early = EarlyNews()
        early.tell(error)
        early.end()
    except RuntimeError as unheard:
        print(f"peftlight: the other machines could not be told ({unheard})", file=sys.stderr)
