"""Signals that ask the program to end, and the end that they bring."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any]


class Stopped(SystemExit):
    """The program was asked to end, and does."""

    def __init__(self, number: int, exit_code: int | None = None) -> None:
        """
        Args:
            number: of the signal.
            exit_code: by default 128 and the number, as shells report it.
        """
        self.name = signal.Signals(number).name
        self.exit_code = 128 + number if exit_code is None else exit_code
        super().__init__(self.exit_code)


class StoppedTogether(Stopped):
    """All processes of a training were asked to end, and do so at the same step: none of them failed."""


@contextmanager
def end_at_once_by(*numbers: int) -> Iterator[None]:
    """Within the block these signals raise `Stopped`, so that half-written files are cleared away."""
    before = take(_stop, *numbers)
    try:
        yield
    finally:
        give_back(before)


def take(handler: Handler, *numbers: int) -> dict[int, Any]:
    """Have the signals call `handler`, and return what they called before; only the main thread can do so."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in numbers}


def give_back(before: Mapping[int, Any]) -> None:
    """Have the signals call again what `take` returned."""
    for number, handler in before.items():
        signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)
