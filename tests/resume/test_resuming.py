"""`fit --resume` on the real command line: which run, the same numbers, the same folder."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import forked
from peftlight.checkpoint_files import read_checkpoint, write_checkpoint
from resume.conftest import metrics, only_run

pytestmark = pytest.mark.slow


def run_json(run: Path) -> dict[str, Any]:
    return json.loads((run / "run.json").read_text())


def assert_same(run: Path, other: Path) -> None:
    tensors = "adapter/adapter_model.safetensors"
    assert (run / tensors).read_bytes() == (other / tensors).read_bytes()
    assert metrics(run) == metrics(other)
    assert (run / "config.yaml").read_text() == (other / "config.yaml").read_text()
    assert {path.name for path in run.iterdir()} == {path.name for path in other.iterdir()}


@pytest.mark.parametrize("how", ["folder", "checkpoint", "configuration"])
def test_a_killed_run_goes_on_in_its_folder_as_if_nothing_had_been(how: str, killed: Path, undisturbed: Path) -> None:
    run = only_run(killed)
    before = run_json(run)
    assert before["state"] == "running"
    (run / "checkpoints" / "torn.ckpt").write_bytes(b"PK")
    given = {"folder": [f"--resume={run}"], "checkpoint": ["--resume", run / "checkpoints" / "last.ckpt"],
             "configuration": ["--resume", "--config", "run.yaml"]}  # fmt: skip
    code, said = forked.peftlight(["fit", *given[how]], killed)
    assert code == 0, said
    assert_same(only_run(killed), only_run(undisturbed))
    assert "resumed at step 7 from" in said
    assert len((killed / "prepared").read_text().splitlines()) == 1, "the strategy looked at the data once more"
    now = run_json(run)
    assert (now["state"], now["steps"], now["started"]) == ("finished", 12, before["started"])
    assert now["command"] == ["fit", "--config", "run.yaml"]
    (resumed,) = now["resumed"]
    assert (resumed["step"], Path(resumed["from"]).name) == (7, "last.ckpt")
    assert "config_before" not in resumed
    log = (run / "log.txt").read_text()
    assert log.count("12 optimizer steps") == 2
    for told in (said, log):
        assert told.count("torn.ckpt is no checkpoint, or is damaged. Used instead: ") == (how != "checkpoint")


def test_a_finished_run_is_told_as_such(finished: Path) -> None:
    for given in (["--resume", only_run(finished)], ["--resume", "--config", "run.yaml"]):
        code, said = forked.peftlight(["fit", *given], finished)
        assert code == 2
        assert "is finished (12 steps)" in said
        assert "--trainer.max_epochs N --allow_changes trainer.max_epochs" in said
        assert f"--init_adapter {only_run(finished) if given[1] != '--config' else 'runs/'}" in said
    assert run_json(only_run(finished))["state"] == "finished"


def test_the_limit_that_leaves_nothing_to_train_is_named_before_anything_is_written(
    finished: Path,
) -> None:
    run = only_run(finished)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    given = ["--trainer.max_epochs=3", "--trainer.max_steps=12", "--allow_changes=trainer.max_epochs,trainer.max_steps"]
    code, said = forked.peftlight(["fit", "--resume", run, *given], finished)
    assert code == 2
    assert "it came to trainer.max_steps 12. To train on: --trainer.max_steps N --allow_changes trainer.max_st" in said
    assert "max_epochs" not in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_limit_below_what_is_done_is_refused(killed: Path) -> None:
    given = ["--trainer.max_steps=5", "--allow_changes=trainer.max_steps"]
    code, said = forked.peftlight(["fit", "--resume", only_run(killed), *given], killed)
    assert code == 2
    assert "has nothing left to train (7 steps): it came to trainer.max_steps 5" in said


def test_no_unfinished_run_of_the_configuration(finished: Path) -> None:
    code, said = forked.peftlight(
        ["fit", "--resume", "--config", only_run(finished) / "config.yaml", "--trainer.default_root_dir=runs"], finished
    )
    assert code == 2
    assert "There is no unfinished run of this configuration in runs. The run runs/" in said


def test_without_its_adapter_a_run_that_was_over_gets_it(finished: Path, undisturbed: Path) -> None:
    """As after a kill between the last step and the adapter's file."""
    run = only_run(finished)
    shutil.rmtree(run / "adapter")
    (run / "run.json").write_text(json.dumps({**run_json(run), "state": "running"}))
    code, said = forked.peftlight(["fit", "--resume", run], finished)
    assert code == 0, said
    assert_same(run, only_run(undisturbed))
    assert run_json(run)["metrics"]["val_loss"] == run_json(only_run(undisturbed))["metrics"]["val_loss"]
    assert run_json(run)["audit"] == run_json(only_run(undisturbed))["audit"]


def test_the_runs_are_listed_where_none_is_of_this_configuration(killed: Path) -> None:
    code, said = forked.peftlight(["fit", "--resume", "--config", "run.yaml", "--optimizer.lr", "0.5"], killed)
    assert code == 2
    assert "no run of this configuration in runs to resume" in said
    assert "running or killed: optimizer.lr is 0.01 there, 0.5 here" in said
    code, said = forked.peftlight(["fit", "--resume", "--config=run.yaml", "--trainer.default_root_dir=other"], killed)
    assert code == 2
    assert "no run of this configuration in other" in said
    assert not (killed / "other").exists()


def test_a_checkpoint_from_elsewhere_begins_a_folder_of_its_own(killed: Path, undisturbed: Path) -> None:
    old = only_run(killed)
    shutil.move(old / "checkpoints" / "last.ckpt", killed / "taken.ckpt")
    shutil.rmtree(old)
    code, said = forked.peftlight(["fit", "--resume", "taken.ckpt"], killed)
    assert code == 2
    assert "runs other code than peftlight's: mine.KilledOnce, mine.MyLoRA" in said
    code, said = forked.peftlight(["fit", "--resume", "taken.ckpt", "--config", "run.yaml"], killed)
    assert code == 0, said
    tensors = "adapter/adapter_model.safetensors"
    assert (only_run(killed) / tensors).read_bytes() == (only_run(undisturbed) / tensors).read_bytes()
    assert metrics(only_run(killed))[-6:] == metrics(only_run(undisturbed))[-6:]


def test_two_processes_do_not_go_on_with_one_run(killed: Path) -> None:
    run = only_run(killed)
    (killed / "hold").touch()
    first = forked.start(["fit", "--resume", run], killed)
    while not (killed / "held").exists():
        assert first.is_alive(), (killed / "out.txt").read_text()
        time.sleep(0.05)
    code, said = forked.peftlight(["fit", "--resume", run], killed, "second.txt")
    assert code == 2
    assert "goes on in another process" in said
    first.kill()
    first.join()
    (killed / "hold").unlink()
    code, said = forked.peftlight(["fit", "--resume", run], killed)  # the system has taken the lock back
    assert code == 0, said


def test_what_lay_beyond_an_earlier_checkpoint_is_set_aside(killed: Path, undisturbed: Path) -> None:
    """So the run stays on the branch that was taken up, when it is killed before its next checkpoint too."""
    run = only_run(killed)
    (killed / "hold").touch()
    first = forked.start(["fit", "--resume", run / "checkpoints" / "previous.ckpt"], killed)
    while not (killed / "held").exists():
        assert first.is_alive(), (killed / "out.txt").read_text()
        time.sleep(0.05)
    first.kill()
    first.join()
    (killed / "hold").unlink()
    assert "beyond step 6 are set aside" in (killed / "out.txt").read_text()
    code, said = forked.peftlight(["fit", "--resume", run], killed)
    assert code == 0, said
    assert "resumed at step 6 from" in said
    assert "set aside" not in said
    assert [path.name for path in run.glob("checkpoints/abandoned-*/*")] == ["last.ckpt"]
    assert_same(run, only_run(undisturbed))


def test_a_checkpoint_without_its_configuration_says_so(killed: Path) -> None:
    run = only_run(killed)
    content = read_checkpoint(run / "checkpoints" / "last.ckpt")
    del content["run"]
    write_checkpoint(content, killed / "bare.ckpt")
    code, said = forked.peftlight(["fit", "--resume", "bare.ckpt", "--config", "run.yaml"], killed)
    assert code == 0, said
    assert said.count("bare.ckpt does not say by which configuration it was trained") == 1


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--resume"], "--resume alone goes on with the newest run of a configuration"),
        (["--resume", "nothing"], "There is no run and no checkpoint nothing"),
        (["--resume", "runs/{run}", "--ckpt_path", "x.ckpt"], "give one of them"),
        (["--resume", "runs/{run}", "--init_adapter", "x"], "give one of them"),
        (["--config", "run.yaml", "--ckpt_path", "last"], "names no file"),
        (["--config", "run.yaml", "--allow_changes", "data"], "give --resume too"),
        (["--resume", "runs/{run}", "--trainer.default_root_dir=other"], "goes on in its own folder, not in other"),
        (["--resume", "runs"], "is no run: it has no run.json"),
    ],
)
def test_what_cannot_be_resumed_says_why_and_leaves_no_folder(given: list[str], told: str, killed: Path) -> None:
    run = only_run(killed)
    code, said = forked.peftlight(["fit", *(one.format(run=run.name) for one in given)], killed)
    assert (code, told in said) == (2, True), said
    assert "Traceback" not in said
    assert only_run(killed) == run


def test_a_refused_run_leaves_no_folder_and_one_that_fails_later_does(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    for refused in (["--data.max_length=1"], ["--model.strategy.target_modules=nothing"], ["--data.source=none.jsonl"]):
        code, _ = forked.peftlight(["fit", "--config", "run.yaml", *refused], folder)
        assert code == 2
        assert not list(folder.glob("runs/*"))
    (folder / "mine.py").write_text((folder / "mine.py").read_text().replace("os.kill(", "raise RuntimeError("))
    (folder / "kill").touch()
    code, said = forked.peftlight(["fit", "--config", "run.yaml"], folder)
    assert code == 1, said
    assert run_json(only_run(folder))["state"] == "failed"
    assert (only_run(folder) / "log.txt").exists()


def test_later_runs_of_this_process_are_not_told_of_this_one(killed: Path) -> None:
    """What is set for the processes that a run starts would lead those of the next one to this run's checkpoint."""
    code = f"""
import os, sys
from peftlight.cli import main
before = {{*os.environ}}
code = main(["fit", "--resume", {str(only_run(killed))!r}])
print(code, *[name for name in os.environ if name not in before and name.startswith("PEFTLIGHT_")])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=killed, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "0", done.stdout[-500:] + done.stderr[-2000:]
