"""One process at a time: what all need is made by the first, a run is gone on with by one; without a collective."""

import fcntl
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from peftlight.errors import UserError

_SILENT = 3.0
"""Seconds of waiting before it is said."""
_CHOOSE = "Choose another folder for what is kept: $PEFTLIGHT_CACHE, for data also --data.cache_dir."


class Held(Exception):
    """Another process has the lock; the text says which, and since when."""


class Lock:
    """A file that one process holds at a time, here or on a machine that shares the disk.

    The operating system frees what a dead process held, once the processes that it forked have ended too.
    """

    def __init__(self, path: Path, otherwise: str) -> None:
        """
        Args:
            path: the file; its folder is made, and the file is there only while it is held.
            otherwise: what to do where files cannot be locked there.
        """
        self.path, self.otherwise = path, otherwise
        self._file: TextIO | None = None

    def take(self, seconds: float = math.inf, waiting: Callable[[str], object] = lambda holder: None) -> None:
        """Wait for the lock, at most so long; `waiting` is told once, after some seconds, who holds it.

        Raises:
            Held: another process still has it.
            UserError: files cannot be locked there.
        """
        started, said = time.monotonic(), False
        while (holder := self._held_by()) is not None:
            waited = time.monotonic() - started
            if waited >= seconds:
                raise Held(holder)
            if waited > _SILENT and not said:
                said = True
                waiting(holder)
            time.sleep(0.1)
        assert self._file is not None
        with suppress(OSError):  # on a full disk what comes will say so better
            self._file.truncate(0)
            text = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}"
            os.write(self._file.fileno(), text.encode())  # without a buffer, which closing would write again

    def leave(self) -> None:
        """Let another process have it."""
        assert self._file is not None
        with suppress(OSError):  # a file that nobody holds is as good as none
            self.path.unlink()  # while it is held: whoever gets it sees that it is gone, and tries again
        self._file.close()

    def _held_by(self) -> str | None:
        """What another process says of itself that has the lock; None: this one has it from now on."""
        file = self._opened()
        if self._got(file) and self._is_at_its_place(file):
            self._file = file
            return None
        with file:
            file.seek(0)
            return file.read()

    def _opened(self) -> TextIO:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return open(self.path, "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"Cannot write in {self.path.parent}: {error.strerror}. {self.otherwise}") from error

    def _got(self, file: TextIO) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            file.close()
            raise UserError(f"The disk of {self.path} offers no locks ({error.strerror}), so several processes could "
                            f"not wait for each other there. {self.otherwise}") from error  # fmt: skip
        return True

    def _is_at_its_place(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Within the block no other process is in a block for the same `path`.

    Whoever waits for more than a few seconds says for whom.

    Raises:
        UserError: the folder of `path` cannot be written.
    """
    lock = Lock(path.with_name(f".{path.name}.lock"), _CHOOSE)
    lock.take(waiting=_say)
    try:
        yield
    finally:
        lock.leave()


def _say(holder: str) -> None:
    print(f"peftlight: waiting for another process that prepares the same: {holder}", file=sys.stderr)
