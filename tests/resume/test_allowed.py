"""What was allowed to change takes effect, and what was not is refused, when everything is loaded too."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import forked
from resume.conftest import metrics, only_run

pytestmark = pytest.mark.slow


def resumed(folder: Path, *more: str) -> str:
    code, said = forked.peftlight(["fit", "--resume", only_run(folder), *more], folder)
    assert code == 0, said
    return said


def rates(run: Path) -> list[str]:
    return [row["lr"] for row in metrics(run) if row["lr"]]


def group(run: Path) -> dict[str, Any]:
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return content["optimizer_states"][0]["param_groups"][0]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["--optimizer.lr=0.02", "--trainer.max_epochs=3"], ["optimizer.lr", "trainer.max_epochs"]),
        (["--lr_scheduler.warmup=0.5"], ["lr_scheduler"]),
    ],
)
def test_the_learning_rate_is_the_one_of_the_new_plan(
    given: list[str], names: list[str], killed: Path, fresh: Callable[[], Path]
) -> None:
    said = resumed(killed, *given, "--allow_changes", *names)
    other = fresh()
    assert forked.peftlight(["fit", "--config", "run.yaml", *given], other)[0] == 0
    assert rates(only_run(killed))[7:] == rates(only_run(other))[7:]
    assert "allowed changes: " in said
    assert all(f"{name}" in said.partition("allowed changes: ")[2] for name in names)
    config = (only_run(killed) / "config.yaml").read_text()
    assert config.replace(str(killed), "") == (only_run(other) / "config.yaml").read_text()


def test_options_of_the_optimizer_change_and_the_rest_of_its_state_stays(killed: Path) -> None:
    before = group(only_run(killed))
    resumed(killed, "--optimizer.weight_decay=0.3", "--allow_changes", "optimizer.weight_decay")
    after = group(only_run(killed))
    assert (before["weight_decay"], after["weight_decay"]) == (0.01, 0.3)
    assert after["betas"] == before["betas"]


def test_a_constant_rate_goes_on_beyond_the_steps_of_the_new_plan(fresh: Callable[[], Path]) -> None:
    folder, constant = fresh(), ["--lr_scheduler=ConstantLR", "--lr_scheduler.factor=1.0"]
    (folder / "kill").touch()
    assert forked.peftlight(["fit", "--config", "run.yaml", *constant], folder)[0] == -9
    before = int(metrics(only_run(folder))[-1]["step"])
    resumed(folder, "--data.batch_size=8", "--allow_changes=data.batch_size")
    assert int(metrics(only_run(folder))[-1]["step"]) > before
    assert float(rates(only_run(folder))[-1]) == pytest.approx(0.01)


def test_other_steps_from_here_on_are_planned_with_those_that_are_done(killed: Path) -> None:
    """Seven steps of four rows are done, and two of eight rows are left of the second epoch."""
    resumed(killed, "--data.batch_size=8", "--allow_changes=data.batch_size")
    assert int(metrics(only_run(killed))[-1]["step"]) == 8
    warmup = round(0.06 * 9)
    expected = [0.01 * (9 - step) / (9 - warmup) for step in (7, 8)]
    assert [float(rate) for rate in rates(only_run(killed))[7:]] == pytest.approx(expected)


def test_a_change_does_not_keep_a_training_that_was_over_from_getting_its_adapter(fresh: Callable[[], Path]) -> None:
    folder = fresh()
    assert forked.peftlight(["fit", "--config", "run.yaml"], folder)[0] == 0
    run = only_run(folder)
    shutil.rmtree(run / "adapter")
    (run / "run.json").write_text((run / "run.json").read_text().replace('"finished"', '"running"'))
    resumed(folder, "--optimizer.weight_decay=0.3", "--allow_changes", "optimizer.weight_decay")
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


def test_another_optimizer_begins_anew(killed: Path) -> None:
    resumed(killed, "--optimizer=SGD", "--optimizer.lr=0.5", "--optimizer.momentum=0.9", "--allow_changes=optimizer")
    assert group(only_run(killed))["momentum"] == 0.9


def test_what_was_allowed_holds_until_there_is_a_checkpoint_of_it(killed: Path, tmp_path: Path) -> None:
    at_once = Path(shutil.copytree(killed, tmp_path / "at_once"))
    change = ["--optimizer.lr=0.02", "--allow_changes", "optimizer.lr"]
    resumed(at_once, *change)
    (killed / "kill").touch()
    assert forked.peftlight(["fit", "--resume", only_run(killed), *change], killed)[0] == -9
    code, said = forked.peftlight(["fit", "--resume", only_run(killed), "--optimizer.lr=0.03"], killed)
    assert (code, "optimizer.lr: 0.01 in the run, 0.03 given" in said) == (2, True), said
    said = resumed(killed)
    assert "allowed by an earlier resume, of which there is no checkpoint yet: optimizer.lr" in said
    assert metrics(only_run(killed)) == metrics(only_run(at_once))


def test_other_rows_are_refused(killed: Path) -> None:
    rows = (killed / "rows.jsonl").read_text()
    (killed / "rows.jsonl").write_text(rows.replace("word 0", "word zero"))
    code, said = forked.peftlight(["fit", "--resume", only_run(killed)], killed)
    assert code == 2
    assert "The data are not those that the run trained on" in said
    assert "--allow_changes data" in said
    resumed(killed, "--allow_changes", "data")


def test_code_that_was_changed_is_refused(killed: Path) -> None:
    (killed / "mine.py").write_text((killed / "mine.py").read_text() + "\n# more\n")
    code, said = forked.peftlight(["fit", "--resume", only_run(killed)], killed)
    assert code == 2
    assert "The code of mine.KilledOnce, mine.MyLoRA is not the one" in said
    resumed(killed, "--allow_changes", "code")


def test_another_base_is_refused(killed: Path, encoder: Path) -> None:
    shutil.copytree(encoder, killed / "other")
    weights = load_file(encoder / "model.safetensors")
    save_file(
        {name: value + 1 for name, value in weights.items()}, killed / "other" / "model.safetensors", {"format": "pt"}
    )
    given = ["fit", "--resume", only_run(killed), "--model.base_model=other", "--allow_changes", "model.base_model"]
    code, said = forked.peftlight(given, killed)
    assert code == 2
    assert "The base is not the one that the run trained on: they differ in values" in said
    code, said = forked.peftlight([*given, "base"], killed)
    assert code == 0, said


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--model.strategy.rank=4", "has shape (2, 32) in the checkpoint, (4, 32) in the model"),
        ("--model.strategy.lora_plus_ratio=16", "other groups of parameters here than in the run"),
        ("--optimizer.amsgrad=true", "amsgrad cannot be switched on in mid-run: max_exp_avg_sq, which"),
    ],
)
def test_a_change_that_does_not_fit_leaves_the_run_as_it_was(given: str, told: str, killed: Path) -> None:
    run, name = only_run(killed), given.strip("-").partition("=")[0]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    code, said = forked.peftlight(["fit", "--resume", run, given, "--allow_changes", name], killed)
    assert (code, told in said) == (2, True), said
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"log.txt"}
    assert after.keys() == before.keys()


def test_what_need_not_be_allowed_is_refused(killed: Path) -> None:
    for name in ("data", "base", "code"):
        code, said = forked.peftlight(["fit", "--resume", only_run(killed), "--allow_changes", name], killed)
        assert (code, f"--allow_changes {name} is not needed" in said) == (2, True), said
