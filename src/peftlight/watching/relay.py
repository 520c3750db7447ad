"""The meeting place of all processes' watches: what one says reaches all, and one that is lost is reported."""

import asyncio
import json
import socket
from contextlib import suppress

from peftlight.watching.news import LEFT, News

_UNHEARD = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
"""Seconds of silence, seconds between questions, and questions, after which a machine counts as lost: 19 s in all."""
LONGEST_LINE = 1 << 20
GONE = (
    "is gone without a word: it was killed (out of memory, by a scheduler), or its machine or network was lost. The "
    "whole run ends."
)


class Relay:
    """Runs in the first process; each process's link is connected to it, its own too.

    The operating system closes a killed process's connections, and asks a silent machine whether it is still there. So
    nothing has to be sent while all is well, and a process that computes for long is not taken for a lost one.
    """

    def __init__(self, token: str) -> None:
        """
        Args:
            token: what a link says first; it keeps out whoever only tries ports.
        """
        self.token = token
        self._said: list[bytes] = []
        self._links: dict[int, asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None

    @property
    def links(self) -> int:
        """How many processes are connected, this one included."""
        return len(self._links)

    async def open(self, only_here: bool) -> int:
        """The port at which links are awaited: of this machine alone, or also from others."""
        listening = socket.create_server(("127.0.0.1", 0)) if only_here else _open_to_others()
        self._server = await asyncio.start_server(self._serve, sock=listening, limit=LONGEST_LINE)
        return int(listening.getsockname()[1])

    async def close(self, patience: float) -> None:
        """Wait until the others have left, but not for long, and tell the rest that this is no failure."""
        waited = 0.0
        while self.links > 0 and waited < patience:
            await asyncio.sleep(0.05)
            waited += 0.05
        await self._tell_all(LEFT)
        if self._server is not None:
            self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            token, _, hello = (await reader.readline()).partition(b" ")
            if token.decode(errors="replace") == self.token:
                await self._link(reader, writer, **json.loads(hello))
        finally:
            writer.close()

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, process: int, host: str) -> None:
        keep_alive(writer)
        self._links[process] = writer
        writer.write(json.dumps({"host": socket.gethostname()}).encode() + b"\n")
        writer.writelines(self._said)  # before this process came
        said = await self._pass_on(reader)
        del self._links[process]
        if not said:
            await self._tell_all(News(process, host, GONE, sudden=True).line())

    async def _pass_on(self, reader: asyncio.StreamReader) -> bool:
        """Whether the process said anything before its connection ended."""
        said = False
        with suppress(OSError):  # a connection that is reset or times out ends like any other
            while line := await reader.readline():
                said = True
                if line != LEFT:
                    await self._tell_all(line)
        return said

    async def _tell_all(self, line: bytes) -> None:
        self._said.append(line)
        for writer in list(self._links.values()):
            with suppress(OSError):
                writer.write(line)
                await writer.drain()


def _open_to_others() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def keep_alive(writer: asyncio.StreamWriter) -> None:
    """Have the operating system notice when the other machine is not there any more."""
    connection = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _UNHEARD.items():
        if hasattr(socket, name):  # macOS lacks some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
