"""One bad input: how it comes about, what is run, and what the message must say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A command that must be refused in a folder with a few good and one or two bad things."""

    name: str
    """What is wrong."""
    command: str
    """What follows `peftlight`, as a shell would read it."""
    says: tuple[str, ...]
    """What the message must hold, whatever else it says."""
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    """Written first."""
    make: Callable[[], object] = lambda: None
    """Done next, in the folder."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the process."""
    largest_file: int = 0
    """Bytes to which its process may write a file, as on a full disk; 0: any. It needs a process of its own."""
    without: tuple[str, ...] = ()
    """Packages that are as if they were not installed."""
    alone: bool = False
    """Whether it needs a process of its own."""


def row(name: str, command: str, *says: str, **how: object) -> Row:
    """A row, with its parts in the order in which one reads them."""
    return Row(name, command, says, **how)  # type: ignore[arg-type]
