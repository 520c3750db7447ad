"""The real command line in processes of its own, forked from one that has imported everything, so that each starts in
a moment; to be killed, for example."""

import multiprocessing
import os
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["peftlight.lightning_cli", "transformers", "transformers.models.bert.modeling_bert"])

_ASKING = threading.Lock()
"""Every question after a process's end reads its exit code, and starting one asks after all; only one may read it."""


def start(
    arguments: Sequence[object], folder: Path, out: str = "out.txt", environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """Start `peftlight` with these arguments in `folder`; what it says goes to a file there.

    Variables of the environment are given as such: processes have those of the moment at which the first one started.
    """
    given = ([str(one) for one in arguments], folder, out, dict(environment or {}))
    process = _SERVER.Process(target=_main, args=given, daemon=True)
    with _ASKING:
        process.start()
    return process


def is_alive(process: ForkServerProcess) -> bool:
    """Whether the process runs; safe among threads, as `start` and `join` are."""
    with _ASKING:
        return process.is_alive()


def join(process: ForkServerProcess) -> None:
    """Wait for the process to end."""
    wait([process.sentinel])
    with _ASKING:
        process.join()


def peftlight(
    arguments: Sequence[object], folder: Path, out: str = "out.txt", environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """The exit code, and what was said; minus the number of the signal that killed it."""
    process = start(arguments, folder, out, environment)
    join(process)
    assert process.exitcode is not None
    return process.exitcode, (folder / out).read_text()


def _main(arguments: list[str], folder: Path, name: str, environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    out = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.path.append(str(folder))
    warnings.simplefilter("ignore")
    from peftlight.cli import main

    sys.exit(main(arguments))
