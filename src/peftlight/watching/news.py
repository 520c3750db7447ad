"""What one process tells the others when it ends before them."""

import json
from dataclasses import asdict, dataclass

from peftlight.errors import one_line


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
