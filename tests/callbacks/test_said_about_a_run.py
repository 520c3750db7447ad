"""What is said about a run, on the terminal and in its log: from its first moment on, and what a trial was."""

from pathlib import Path

import pytest

from callbacks.commanded import command, recorded
from forked import peftlight
from peftlight.cli import main


@pytest.mark.filterwarnings("default")
def test_the_log_holds_what_was_said_before_it_was_opened(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(command(tmp_path, encoder, "nowhere", **{"trainer.precision": "16-mixed", "trainer.max_steps": 1})) == 0
    run = recorded(tmp_path)
    assert run["precision"] == "bf16-mixed"
    log = (run["run"] / "log.txt").read_text()
    assert "Seed set to" in log
    change = next(line for line in log.splitlines() if "16-mixed" in line and "bf16-mixed" in line)
    assert "WARNING" in change
    assert log.count(change.partition("WARNING")[2]) == 1


def test_a_trial_says_that_it_was_one_and_leaves_no_folder(encoder: Path, tmp_path: Path) -> None:
    code, told = peftlight(command(tmp_path, encoder, "nowhere", **{"trainer.fast_dev_run": 2}), tmp_path)
    assert code == 0, told
    assert "a trial of at most 2 batches" in told
    assert "no adapter and no checkpoint was saved" in told
    assert "finished" not in told
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_trial_that_wrote_something_leaves_it_and_is_recorded_as_a_trial(encoder: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path, encoder, "nowhere", **{"trainer.fast_dev_run": 2, "data.predict_source": "rows.tsv"})
    code, told = peftlight(["predict", *arguments[1:]], tmp_path)
    assert code == 0, told
    run = recorded(tmp_path)
    assert run["state"] == "a trial went through"
    assert len((run["run"] / "predictions.jsonl").read_text().splitlines()) == 4  # two batches of two rows
