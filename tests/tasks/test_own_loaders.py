"""A user's own loaders on several processes: each row counts once, and who runs out of rows says so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import BatchSampler, SequentialSampler

from peftlight.tasks.row_shares import OnceEach
from tasks.own_loaders_in_two_processes import SIZES, metrics
from tasks.small import QUIET

pytestmark = QUIET


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 12, 13])
def test_each_row_is_there_once_and_all_processes_have_as_many_batches(
    rows: int, batch: int, processes: int, drop_last: bool
) -> None:
    counted, numbers = [], set()
    for rank in range(processes):
        sampler = OnceEach(SequentialSampler(range(rows)), batch, drop_last, processes, rank)
        batches = list(BatchSampler(sampler, batch, drop_last))
        assert sum(map(len, batches)) == len(sampler)
        numbers.add(len(batches))
        counted += [row for number, rows_of in enumerate(batches) for row in rows_of if number != sampler.filling]
    assert len(numbers) == 1
    assert len(set(counted)) == len(counted)
    assert drop_last or sorted(counted) == list(range(rows))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("own")
    script = Path(__file__).with_name("own_loaders_in_two_processes.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(folder)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert all((folder / f"own_{rank}.json").exists() for rank in (0, 1)), done.stderr[-3000:]
    ended = [folder / f"ended_{rank}.txt" for rank in (0, 1)]
    return [{**json.loads((folder / f"own_{rank}.json").read_text()),
             "ended": ended[rank].read_text() if ended[rank].exists() else ""} for rank in (0, 1)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_metrics_are_those_of_one_process(found: list[dict[str, Any]], tmp_path: Path) -> None:
    alone = metrics(tmp_path)
    assert alone.keys() == {f"{name} {fits}" for name in SIZES for fits in (False, True)}
    for of_process in found:
        for name, values in alone.items():
            assert of_process["metrics"][name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.slow
def test_what_is_there_twice_in_training_is_told(found: list[dict[str, Any]]) -> None:
    assert "train: 9 rows do not go round 2 processes, so 1 of them are there twice in each epoch" in found[0]["told"]
    assert not any("recommended to use `Trainer(devices=1" in line for line in found[0]["told"])


@pytest.mark.slow
def test_a_process_that_runs_out_of_rows_says_so(found: list[dict[str, Any]]) -> None:
    told = [
        "Process 0 has no rows left after 3 batches of this epoch",
        "Process 1 has more rows, unlike another process, after 3 batches of this epoch",
    ]
    ended = [of_process["ended"] for of_process in found]
    assert any(ended)  # of both, the first ends the other
    assert all(one in text for one, text in zip(told, ended, strict=True) if text)
