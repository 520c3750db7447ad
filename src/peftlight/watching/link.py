"""One process's connection to the relay, in a thread of its own, for the main one may wait in a collective."""

import asyncio
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent import futures
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from peftlight.watching.news import LEFT, News
from peftlight.watching.relay import GONE, LONGEST_LINE, Relay, keep_alive

_PATIENCE = 10.0
"""Seconds for what takes milliseconds when all is well."""


class Link:
    """Waits for the process group, connects to the relay, which the first process also runs, and hears its news."""

    def __init__(self, key: str, process: int, only_here: bool, hear: Callable[[News], None]) -> None:
        """
        Args:
            key: name under which the relay's address is found in the process group's store.
            process: the number of this process.
            only_here: whether all processes are on this machine.
            hear: called in the thread with the news of any process, this one included.
        """
        self.key, self.process, self.only_here, self.hear = key, process, only_here, hear
        self._loop = asyncio.new_event_loop()
        self._relay: Relay | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._left = False
        self._connected = threading.Event()
        self.thread = threading.Thread(target=self._run, name="peftlight-watch", daemon=True)
        self.thread.start()

    # ---- called by the main thread

    def tell(self, news: News) -> bool:
        """Tell every process; false: there is no connection, so nobody can be told."""
        connected = self._is_connected()
        if connected:
            self._do(self._write(news.line()))
        return connected

    def leave(self) -> None:
        """Say that this process ends as it should, and close the connection."""
        self._left = True
        if self._is_connected():
            self._do(self._leave())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join(_PATIENCE)

    def others_gone(self) -> bool:
        """In the first process: whether no other is connected any more. In the others: true."""
        return self._relay is None or self._relay.links <= 1

    def _is_connected(self) -> bool:
        return dist.is_initialized() and self._connected.wait(_PATIENCE) and self._writer is not None

    def _do(self, action: Coroutine[Any, Any, None]) -> None:
        with suppress(futures.TimeoutError):
            asyncio.run_coroutine_threadsafe(action, self._loop).result(2 * _PATIENCE)

    # ---- in the thread

    def _run(self) -> None:
        watching = self._loop.create_task(self._watch())
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop) | {watching}
        for task in tasks:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _watch(self) -> None:
        while not dist.is_initialized():
            await asyncio.sleep(0.05)
        try:
            reader, first = await self._connect()
        except (OSError, RuntimeError) as error:  # the store's own errors are of the latter kind
            print(f"peftlight: process {self.process} cannot reach process 0 to watch over the others ({error}): if "
                  "one fails, the rest may wait until a collective times out. Let the machines reach each other's "
                  "ports.", file=sys.stderr)  # fmt: skip
            return
        finally:
            self._connected.set()
        await self._listen(reader, first)

    async def _listen(self, reader: asyncio.StreamReader, first: str) -> None:
        line = b""
        with suppress(OSError):
            while (line := await reader.readline()) not in (b"", LEFT):
                self.hear(News.of(line))
        if not line and not self._left:
            self.hear(News(0, first, GONE, sudden=True))

    async def _connect(self) -> tuple[asyncio.StreamReader, str]:
        """What the relay sends, and the machine of the first process."""
        # torch's own store: private, but there however the processes were started.
        store = dist.PrefixStore("peftlight", dist.distributed_c10d._get_default_store())
        if self.process == 0:
            self._relay = Relay(secrets.token_hex(16))
            port = await self._relay.open(self.only_here)
            address = {"port": port, "token": self._relay.token, "hosts": _hosts(self.only_here)}
            store.set(self.key, json.dumps(address))
        while not store.check([self.key]):  # to wait in the store would keep the main thread out of it
            await asyncio.sleep(0.05)
        found = json.loads(store.get(self.key))
        return await self._greet(found["hosts"], found["port"], found["token"])

    async def _greet(self, hosts: list[str], port: int, token: str) -> tuple[asyncio.StreamReader, str]:
        hello = f"{token} {json.dumps({'process': self.process, 'host': socket.gethostname()})}\n"
        for host in hosts:
            with suppress(OSError, asyncio.TimeoutError):
                opening = asyncio.open_connection(host, port, limit=LONGEST_LINE)
                reader, writer = await asyncio.wait_for(opening, _PATIENCE / 2)
                writer.write(hello.encode())
                if answer := await reader.readline():
                    keep_alive(writer)
                    self._writer = writer
                    return reader, json.loads(answer)["host"]
        raise ConnectionError(f"nobody answers at {' or '.join(hosts)}, port {port}")

    async def _write(self, line: bytes) -> None:
        assert self._writer is not None
        with suppress(OSError):
            self._writer.write(line)
            await self._writer.drain()

    async def _leave(self) -> None:
        await self._write(LEFT)
        assert self._writer is not None
        self._writer.close()
        if self._relay is not None:
            await self._relay.close(_PATIENCE)


def _hosts(only_here: bool) -> list[str]:
    """Where the other processes may reach this one, the likeliest first."""
    if only_here:
        return ["127.0.0.1"]
    main = os.environ.get("MASTER_ADDR", "localhost")
    kind, _, _, _, address = socket.getaddrinfo(main, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as towards:
        towards.connect(address)  # sends nothing; says which of its addresses this machine would use
        own = towards.getsockname()[0]
    return [own, main, socket.gethostname()]
