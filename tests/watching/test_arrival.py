"""Whoever waits for processes that do not come says so, and hears of those that have failed."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from peftlight.errors import UserError
from peftlight.watching import arrival, early
from peftlight.watching.arrival import Arrival
from peftlight.watching.early import EarlyNews, has_early_news, tell_early


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The environment of process 0 of 3, on the second of two machines, and the store that it names."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0", "WORLD_SIZE": "3",
                 "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2",
                 "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0"}  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return store


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrival, "_USUAL", 0.1)
    monkeypatch.setattr(arrival, "_LONG", 0.5)


def said_while_waiting(process: int, speaks: bool, capfd: pytest.CaptureFixture[str], seconds: float = 60) -> str:
    """What the process says until it has said that it waits; libraries may say something, too."""
    waiting, said, until = Arrival(process, speaks, []), "", time.monotonic() + seconds
    while "has waited" not in said and time.monotonic() < until:
        time.sleep(0.1)
        said += capfd.readouterr().err
    waiting.over()
    return said


def test_who_waits_for_long_says_for_whom(
    torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "process 0 has waited for a minute until all are there, and waits on for processes 1, 2:" in (
        said_while_waiting(0, True, capfd)
    )
    monkeypatch.setenv("RANK", "1")
    assert "process 1 has waited for a minute until all are there, and waits on for process 2:" in (
        said_while_waiting(1, True, capfd)
    )


def test_one_on_each_machine_says_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert "has waited" not in said_while_waiting(1, False, capfd, seconds=3)


def test_without_a_store_it_is_not_known_for_whom(
    torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sentence = "process 2 has waited for a minute until all are there, and waits on for the other processes:"
    with monkeypatch.context() as unreachable:
        unreachable.setattr(early, "_REACHED", timedelta(seconds=1))
        unreachable.setenv("MASTER_PORT", "9")
        assert sentence in said_while_waiting(2, True, capfd)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert not has_early_news()
    assert sentence in said_while_waiting(2, True, capfd)


def test_of_several_failures_the_first_is_heard(torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "2")
    tell_early(UserError("no such file"))
    monkeypatch.setenv("RANK", "1")
    tell_early(ValueError("another"))
    news = EarlyNews().heard()
    assert news is not None
    assert (news.process, news.text, news.code) == (2, "no such file", 2)


def test_the_machine_of_the_store_stays_until_all_have_heard(
    torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    EarlyNews().end()
    monkeypatch.setenv("GROUP_RANK", "0")
    started = time.monotonic()
    tell_early(UserError("no such file"))
    assert time.monotonic() - started < 20
    monkeypatch.setattr(early, "_LINGER", 1.0)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")  # the last of which never says that it ends
    started = time.monotonic()
    tell_early(UserError("no such file"))
    assert time.monotonic() - started > 1


def test_a_store_that_is_gone_is_said(
    torchrun: dist.TCPStore, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(early, "_REACHED", timedelta(seconds=1))
    monkeypatch.setenv("MASTER_PORT", "9")
    tell_early(UserError("no such file"))
    assert "the other machines could not be told" in capfd.readouterr().err
