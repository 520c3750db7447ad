"""Trainings of proofs without the time that a new interpreter takes."""

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import pytest

from peftlight.cli import main
from peftlight.proofs import replay, trainings

_ALONE = "--trainer.devices=1"


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our command line in a fork of this process: still one of its own, which can be killed."""
    for room in (trainings, replay):
        monkeypatch.setattr(room, "peftlight", _forked)


@pytest.fixture
def alone_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork for a training of one process; several are started by Lightning, and that begins with an interpreter."""
    real = trainings.peftlight
    monkeypatch.setattr(trainings, "peftlight", lambda words: (_forked if _ALONE in words else real)(words))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))


def _forked(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        with open(out, "w") as out_file, open(err, "w") as err_file:
            child = os.fork()
            if child == 0:
                _run(arguments, out_file, err_file)
        _, status = os.waitpid(child, 0)
        return subprocess.CompletedProcess(
            list(arguments), os.waitstatus_to_exitcode(status), out.read_text(), err.read_text()
        )


def _run(arguments: Sequence[str], out: IO[str], err: IO[str]) -> None:
    code = 1
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(arguments))
        out.flush()
        err.flush()
    finally:
        os._exit(code)
