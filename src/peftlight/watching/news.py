"""What one process tells the others when it ends before them."""

import json
import os
import signal
import socket
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from peftlight.errors import UserError, one_line

_LONGEST = 20_000
"""Characters of an error that the other processes are told."""


@dataclass(frozen=True)
class News:
    """A process has ended, or is about to, and why."""

    process: int
    """Its number among all."""
    host: str
    """The machine that it ran on."""
    text: str
    """The error, in the words of the process itself where it could still say them."""
    code: int = 1
    """The exit code with which the others follow."""
    stream: str = ""
    """The terminal or file that its errors go to."""
    sudden: bool = False
    """Whether it was gone without a word."""

    def line(self) -> bytes:
        """As one line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def of(cls, line: bytes) -> "News":
        """What `line` wrote."""
        return cls(**json.loads(line))

    def told(self) -> str:
        """For the terminals of the others."""
        what = "" if self.sudden else "failed, and with it the whole run: "
        shown = "\n".join(map(one_line, self.text.split("\n")))  # another machine's text must not steer the terminal
        return f"process {self.process} on {self.host} {what}{shown}"


LEFT = b"{}\n"
"""The line with which a process says that it ends as it should."""


def news_of(exception: BaseException, process: int) -> News:
    """That this process ends by the exception."""
    if isinstance(exception, UserError | OSError):  # as the command line ends by these
        text, code = str(exception), 2
    elif isinstance(exception, Exception):
        text, code = f"{type(exception).__name__}: {exception}", 1
    else:
        text, code = "it was interrupted", _code_of_interruption(exception)
    return News(process, socket.gethostname(), text[:_LONGEST], code, stream())


def stream() -> str:
    """Which terminal or file this process's errors go to."""
    try:
        status = os.fstat(2)
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"
    return f"{socket.gethostname()} {status.st_dev} {status.st_ino}"


def _code_of_interruption(exception: BaseException) -> int:
    if isinstance(exception, SIGTERMException):
        return 128 + signal.SIGTERM
    code: Any = getattr(exception, "code", 128 + signal.SIGINT)
    return code if isinstance(code, int) and code else 1
