"""An error of one process ends all of them within a minute, each with its text; so does a process that is killed."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from processes.ranks import Ranks, fit, trouble

pytestmark = pytest.mark.slow

FAILURES = [
    ("setup", 0, 2, "bug", 1),
    ("configure_model", 1, 2, "user", 2),
    ("step", 2, 3, "bug", 1),
    ("step", 1, 2, "collective", 1),
    ("step", 0, 2, "long", 1),
    ("validation", 0, 2, "user", 2),
]


def seconds_since(folder: Path) -> float:
    """Since something went wrong there."""
    return time.time() - float((folder / "when").read_text())


def the_record(folder: Path) -> dict[str, str]:
    (run,) = (folder / "runs").iterdir()
    record: dict[str, str] = json.loads((run / "run.json").read_text())
    return record


@pytest.mark.parametrize(("where", "rank", "count", "kind", "code"), FAILURES)
def test_an_error_of_one_ends_all_with_its_text(
    where: str, rank: int, count: int, kind: str, code: int, tmp_path: Path, encoder: Path
) -> None:
    ranks = Ranks(count, [*fit(tmp_path, encoder), *trouble(where, rank, kind)], tmp_path)
    assert ranks.ended() == [code] * count
    assert seconds_since(tmp_path) < 60
    for number, said in enumerate(ranks.said()):
        (error, *further) = [line for line in said.splitlines() if line.startswith("peftlight: ")]
        assert f"the {where} went wrong" in error
        assert not further
        assert (f"error: process {rank} on " in error) == (number != rank)
        assert "onnection" not in said, "what only follows from the error is not shown"
    if where != "setup":  # that of the record itself comes later
        record = the_record(tmp_path)
        assert record["state"] == "failed"
        assert f"the {where} went wrong" in record["error"]


@pytest.mark.parametrize(("rank", "count"), [(0, 2), (1, 3)])
def test_a_killed_process_is_named_by_all_others(rank: int, count: int, tmp_path: Path, encoder: Path) -> None:
    ranks = Ranks(count, [*fit(tmp_path, encoder), *trouble("step", rank, "kill")], tmp_path)
    assert ranks.ended() == [-9 if number == rank else 1 for number in range(count)]
    assert seconds_since(tmp_path) < 60
    for number, said in enumerate(ranks.said()):
        errors = [line for line in said.splitlines() if line.startswith("peftlight: ")]
        if number != rank:
            (error,) = errors
            assert f"error: process {rank} on " in error
            assert "is gone without a word: it was killed" in error
            assert "This process was at step 3. No checkpoint was written yet." in error
    record = the_record(tmp_path)
    assert record["state"] == ("running" if rank == 0 else "failed")  # the first one keeps the record


def test_a_signal_ends_one_that_waits_for_another_which_never_comes(tmp_path: Path, encoder: Path) -> None:
    ranks = Ranks(1, [*fit(tmp_path, encoder), "--trainer.num_nodes=2"], tmp_path, of=2)
    until = time.monotonic() + 300
    while "Initializing distributed" not in ranks.said()[0]:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.5)  # it is in torch by now
    os.kill(ranks.processes[0].pid or 0, signal.SIGTERM)
    assert ranks.ended() == [128 + signal.SIGTERM]
    assert "peftlight: ended by SIGTERM, before all processes had come" in ranks.said()[0]
    assert not list((tmp_path / "runs").glob("*"))


def test_what_all_meet_alike_is_said_once(tmp_path: Path, encoder: Path) -> None:
    ranks = Ranks(3, [*fit(tmp_path, encoder), *trouble("configure_model")], tmp_path, shared=True)
    assert ranks.ended() == [2, 2, 2]
    said = ranks.said()[0]
    assert said.count("peftlight: error: the configure_model went wrong") == 1
    assert said.count("went wrong") == 1


def test_nothing_ends_a_run_in_which_all_is_well(tmp_path: Path, encoder: Path) -> None:
    ranks = Ranks(3, fit(tmp_path, encoder), tmp_path)
    assert ranks.ended() == [0, 0, 0]
    assert not [said for said in ranks.said() if "peftlight: " in said]
    assert the_record(tmp_path)["state"] == "finished"
