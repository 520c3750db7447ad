"""Data are prepared once, by one process, while the others wait: however long it takes, and without a collective."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftlight.errors import UserError
from peftlight.locks import alone
from processes.ranks import Ranks, fit

SLOW = """
import os, time
from peftlight.data import SST2
from peftlight.data.encoder import Encoder

plain = Encoder.encode


def encode(self, *given):
    with open("tokenized", "a") as note:
        note.write(os.environ["LOCAL_RANK"])
    time.sleep(12)
    return plain(self, *given)


Encoder.encode = encode


class Slow(SST2):
    pass
"""
HOLD = """
import sys
from pathlib import Path
from peftlight.locks import alone
with alone(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    """Another process that is alone with `path`."""
    arguments = [sys.executable, "-c", HOLD, str(path)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_who_waits_says_for_whom_and_a_dead_process_holds_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peftlight.locks._SILENT", 0.2)
    other = holder(tmp_path / "tokens")
    started = time.monotonic()
    killing = subprocess.Popen(["sh", "-c", f"sleep 1; kill -9 {other.pid}"])
    with alone(tmp_path / "tokens"):
        assert 0.9 < time.monotonic() - started < 60
    assert f"waiting for another process that prepares the same: process {other.pid} on " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    other.communicate()
    killing.wait()


def test_other_files_are_not_waited_for(tmp_path: Path) -> None:
    other = holder(tmp_path / "one")
    with alone(tmp_path / "another"):
        assert other.poll() is None
    other.kill()
    other.communicate()


def test_only_one_at_a_time(tmp_path: Path) -> None:
    """Eight processes add one to a number in a file, each slowly."""
    code = """
import sys, time
from pathlib import Path
from peftlight.locks import alone
for _ in range(5):
    with alone(Path(sys.argv[1])):
        number = int(Path(sys.argv[1]).read_text())
        time.sleep(0.01)
        Path(sys.argv[1]).write_text(str(number + 1))
"""
    count = tmp_path / "count"
    count.write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(count)]) for _ in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    assert count.read_text() == "40"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write in .*/file.*PEFTLIGHT_CACHE"), alone(tmp_path / "file" / "x"):
        pass


@pytest.mark.slow
def test_tokenizing_may_take_longer_than_collectives_wait(tmp_path: Path, encoder: Path) -> None:
    timeout = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"timeout": "0:0:10"}}
    options = {"data": "slow.Slow", "data.source": "rows.tsv", "trainer.strategy": str(timeout).replace("'", '"')}
    arguments = fit(tmp_path, encoder, **options)
    (tmp_path / "slow.py").write_text(SLOW)
    ranks = Ranks(2, arguments, tmp_path)
    assert ranks.ended() == [0, 0], ranks.said()
    assert (tmp_path / "tokenized").read_text() == "0"
