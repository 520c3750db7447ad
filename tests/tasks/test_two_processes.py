"""Two real processes: each goes on with its own random numbers and gradients, and every row counts once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.resuming import train_uneven
from tasks.small import QUIET, assert_equal_states

pytestmark = [*QUIET, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("in_two_processes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(script), str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def found(folder: Path, rank: int) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / f"found_{rank}.json").read_text())
    return result


@pytest.mark.parametrize("name", ["ours", "theirs", "AdaLoRA", "FSDP2"])
def test_each_process_goes_on_from_every_moment(name: str, folder: Path) -> None:
    assert found(folder, 0)[name] == found(folder, 1)[name] == []


def test_rows_that_do_not_go_round_count_once(folder: Path, tmp_path: Path) -> None:
    """13 rows in batches of 6, and 5 to validate on: as one process has them, in losses, metrics and weights."""
    alone = train_uneven(tmp_path, 6)
    assert_equal_states(torch.load(folder / "uneven.pt"), alone.trained, rtol=1e-5, atol=1e-7)
    parts = [[event[3] for event in found(folder, rank)["events"] if event[0] == "rows"] for rank in (0, 1)]
    whole = [event[3] for event in alone.events if event[0] == "rows"]
    assert [sorted({*one, *other}) for one, other in zip(*parts, strict=True)][2] != sorted(
        whole[2]
    )  # one row fills up
    assert [sorted({*one, *other}) for one, other in zip(*parts, strict=True)][:2] == [
        sorted(rows) for rows in whole[:2]
    ]
    logged = [event[1:] for event in alone.events if event[0] == "logged"]
    theirs = [event[1:] for event in found(folder, 0)["events"] if event[0] == "logged"]
    assert [step for step, _ in theirs] == [step for step, _ in logged]
    for (_, one), (_, other) in zip(theirs, logged, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
