"""A progress bar for preparing many rows."""

from collections.abc import Iterable, Sequence
from typing import TypeVar

from peftlight.environment import is_first_process

T = TypeVar("T")
_WORTH_A_BAR = 2000


def with_bar(batches: Sequence[T], rows: int, description: str) -> Iterable[T]:
    """The batches, with a bar while they are worked through if they hold many rows; on the first process only."""
    if rows <= _WORTH_A_BAR or not is_first_process():
        return batches
    from rich.console import Console
    from rich.progress import track

    return track(batches, description=description, console=Console(stderr=True), transient=True)
