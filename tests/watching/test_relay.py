"""What the relay passes on, to whom, and what it makes of connections that end."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from peftlight.watching.news import LEFT, News
from peftlight.watching.relay import Relay

Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def greeted(port: int, process: int) -> Ends:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"word {json.dumps({'process': process, 'host': f'host-{process}'})}\n".encode())
    assert "host" in json.loads(await reader.readline())
    return reader, writer


def with_relay(test: Callable[[Relay, int], Awaitable[Any]]) -> None:
    async def run() -> None:
        relay = Relay("word")
        await asyncio.wait_for(test(relay, await relay.open(only_here=True)), 10)
        await relay.close(patience=0.0)

    asyncio.run(run())


def test_news_reach_all_and_whoever_comes_later() -> None:
    async def test(relay: Relay, port: int) -> None:
        news = News(1, "host-1", "it went\nwrong", 2)
        first, second = await greeted(port, 0), await greeted(port, 1)
        second[1].write(news.line())
        late = await greeted(port, 2)
        for reader, writer in (first, second, late):
            assert News.of(await reader.readline()) == news
            writer.close()

    with_relay(test)


def test_a_connection_that_breaks_off_is_reported_and_one_that_leaves_is_not() -> None:
    async def test(relay: Relay, port: int) -> None:
        reader, own = await greeted(port, 0)
        _, leaving = await greeted(port, 1)
        leaving.write(LEFT)
        leaving.close()
        _, failing = await greeted(port, 2)
        failing.write(News(2, "host-2", "an error").line())
        failing.close()
        _, killed = await greeted(port, 3)
        killed.close()
        assert News.of(await reader.readline()).text == "an error"
        gone = News.of(await reader.readline())
        assert (gone.process, gone.host, gone.sudden, gone.code) == (3, "host-3", True, 1)
        own.close()

    with_relay(test)


def test_strangers_are_shown_out_and_disturb_nobody() -> None:
    async def test(relay: Relay, port: int) -> None:
        reader, own = await greeted(port, 0)
        for hello in (b"\n", b"GET / HTTP/1.1\n", b"\xff\xfe\n", b"wrong {}\n"):
            theirs, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(hello + News(7, "nowhere", "a lie").line())
            assert await theirs.read() == b""
            writer.close()
        await relay.close(patience=0.0)
        assert await reader.readline() == LEFT
        own.close()

    with_relay(test)


def test_another_machines_text_does_not_steer_the_terminal() -> None:
    assert News(1, "b", "two\nlines \x1b[2J").told() == (
        "process 1 on b failed, and with it the whole run: two\nlines \\x1b[2J"
    )
