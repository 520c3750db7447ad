"""`peftlight replay` of runs that are as they were, and of some that are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftlight.cli import main
from proofs.small import CONFIGS, PROOF, SENTENCES

pytestmark = [*PROOF, pytest.mark.usefixtures("forked")]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    root = tmp_path_factory.mktemp("recorded")
    return fitted(root, encoder)


def fitted(root: Path, encoder: Path, *more: str) -> Path:
    """The folder of a new run."""
    flags = ["--trainer.max_steps=6", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={root}", *more]
    config = f"--config={CONFIGS / 'lora.yaml'}"
    assert main(["fit", "--traceback", config, f"--model.base_model={encoder}", *SENTENCES, *flags]) == 0
    (folder,) = root.iterdir()
    return folder


@pytest.fixture
def changed(run: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], object]], str]:
    """A copy of the run, in whose record something is changed."""

    def change(how: Callable[[dict[str, Any]], object]) -> str:
        record = json.loads((run / "run.json").read_text())
        how(record)
        (tmp_path / "run.json").write_text(json.dumps(record))
        (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
        return str(tmp_path)

    return change


def test_a_run_as_it_was_agrees_bit_for_bit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "--traceback", str(run), "--steps", "4"]) == 0
    assert "equal: 4 of 4 steps, losses bit for bit\n" in capsys.readouterr().out


def test_a_run_that_began_with_an_adapter_begins_with_it_again(
    run: Path, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run / "adapter", tmp_path / "first")
    second = fitted(tmp_path / "runs", encoder, f"--init_adapter={tmp_path / 'first'}")
    assert main(["replay", "--traceback", str(second), "--steps", "2"]) == 0
    assert "equal: 2 of 2 steps, losses bit for bit\n" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "first")
    shutil.copytree(second / "adapter", tmp_path / "first")
    assert main(["replay", str(second)]) == 2
    assert "what is there now is another" in capsys.readouterr().err


def test_of_a_run_resumed_with_changes_the_steps_before_are_trained_as_they_were(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = shutil.copytree(run, tmp_path / "again")
    changes = ["--trainer.max_steps=8", "--optimizer.lr=0.5", "--allow_changes", "trainer.max_steps", "optimizer.lr"]
    assert main(["fit", "--traceback", "--resume", str(again), *changes]) == 0
    assert len(json.loads((again / "run.json").read_text())["first_steps"]) == 8
    assert main(["replay", "--traceback", str(again)]) == 0
    assert "equal: 6 of 6 steps, losses bit for bit\n" in capsys.readouterr().out


def test_a_run_on_several_machines_is_refused(changed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(changed(lambda record: None))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("num_nodes: 1\n", "num_nodes: 2\n"))
    assert main(["replay", str(folder)]) == 2
    assert "was trained on 2 machines (trainer.num_nodes)" in capsys.readouterr().err


def test_another_loss_is_told_with_its_step_and_what_else_changed(
    changed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(record: dict[str, Any]) -> None:
        record["first_steps"][2]["loss"] = 0.5
        record["versions"]["torch"] = "1.0"
        record["threads"] = 64

    assert main(["replay", "--traceback", changed(change), "--steps", "3"]) == 1
    said = capsys.readouterr().out
    assert "differs: step 3 is the first that differs: loss 0.5 recorded, 0." in said
    assert "threads: 64 recorded, " in said
    assert "torch 1.0 recorded, " in said


def test_the_last_bits_are_told_apart_from_equality(changed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def change(record: dict[str, Any]) -> None:
        record["first_steps"][0]["loss"] *= 1 + 1e-6

    assert main(["replay", "--traceback", changed(change), "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert "equal: 2 of 2 steps within 1e-05: the losses are not the same bits" in said
    assert "1.0e-06 of their size, in step 1" in said


def test_other_rows_are_told(changed: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def change(record: dict[str, Any]) -> None:
        record["first_steps"][1]["batches"] = ["0" * 12]

    assert main(["replay", "--traceback", changed(change), "--steps", "2"]) == 1
    assert "step 2 is the first that differs: it has other rows, or their content" in capsys.readouterr().out


@pytest.mark.parametrize(("how", "said"), [
    (lambda record: record.pop("first_steps"), "has no first steps in its run.json"),
    (lambda record: record.update(first_steps=[{"loss": "low"}]), "first_steps is damaged"),
])  # fmt: skip
def test_what_recorded_no_steps_is_refused(
    how: Any, said: str, changed: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", changed(how)]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "is no folder of a run: it has no run.json" in capsys.readouterr().err
    assert main(["replay", f"{tmp_path}s"]) == 2
    assert f"There is no run {tmp_path}s. Did you mean '{tmp_path.name}'" in capsys.readouterr().err
