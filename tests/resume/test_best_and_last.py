"""`--ckpt_path best` and `last` of an evaluation: the checkpoints of the newest run of the model, and nothing less."""

import json
from pathlib import Path

import pytest

from callbacks.commanded import command, recorded
from forked import peftlight
from peftlight.checkpoint_files import read_checkpoint

BEST = {"trainer.max_epochs": 3, "optimizer.lr": 0.05, "model.strategy.dropout": 0.0}


def evaluated(arguments: list[str], folder: Path, command: str = "validate", *more: str) -> tuple[int, str]:
    return peftlight([command, *arguments[1:], *more], folder)


@pytest.fixture(scope="module")
def trained(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], Path]:
    """A folder with a run that keeps its best checkpoint by a metric and the last one, its options, and its folder."""
    folder = tmp_path_factory.mktemp("best")
    arguments = command(folder, encoder, "nowhere", **BEST)
    best = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val_loss",
            "--trainer.callbacks.mode=max", "--trainer.callbacks.save_last=true"]  # fmt: skip
    code, told = peftlight([*arguments, *best], folder)
    assert code == 0, told
    return folder, arguments, recorded(folder)["run"]


@pytest.mark.slow
def test_they_are_of_the_newest_run_of_the_model(trained: tuple[Path, list[str], Path]) -> None:
    folder, arguments, run = trained
    kept = {path.name: read_checkpoint(path) for path in (run / "checkpoints").iterdir()}
    states = [content["callbacks"] for content in kept.values()]
    scores = [float(one["best_model_score"]) for state in states for name, one in state.items() if "monitor" in one]
    code, told = evaluated(arguments, folder, "validate", "--ckpt_path=best", "--trainer.default_root_dir=runs")
    assert code == 0, told
    assert "best: runs/" in told
    newest = max((folder / "runs").glob("*validate*"))
    score = json.loads((newest / "run.json").read_text())["metrics"]["val_loss"]
    assert score == pytest.approx(max(scores), rel=1e-5)  # mode max: the worst one, which the last is not
    code, told = evaluated(arguments, folder, "predict", "--ckpt_path=last", "--data.predict_source=rows.tsv")
    assert code == 0, told
    assert f"last: runs/{run.name}/checkpoints/last.ckpt" in told


@pytest.mark.slow
def test_a_runs_own_configuration_names_it(trained: tuple[Path, list[str], Path]) -> None:
    folder, _, run = trained
    config = run.relative_to(folder) / "config.yaml"
    code, told = peftlight(["test", "--config", config, "--ckpt_path", "last", "--data.test_source=rows.tsv"], folder)
    assert code == 0, told
    assert f"last: runs/{run.name}/checkpoints/last.ckpt" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--ckpt_path=best", "--model.strategy.rank=3"], "has none. What is there"),
        (["--ckpt_path=last", "--trainer.default_root_dir=elsewhere"], "elsewhere has none"),
        (["--ckpt_path=hpc"], "names no file"),
    ],
    ids=["other model", "other place", "hpc"],
)
def test_where_there_is_none_it_is_refused(more: list[str], says: str, trained: tuple[Path, list[str], Path]) -> None:
    folder, arguments, _ = trained
    code, told = evaluated(arguments, folder, "validate", *more)
    assert code == 2, told
    assert says in told


def test_a_run_without_a_best_one_says_what_keeps_it(encoder: Path, tmp_path: Path) -> None:
    arguments = command(tmp_path, encoder, "nowhere", **{"trainer.max_steps": 1})
    assert peftlight(arguments, tmp_path)[0] == 0
    code, told = evaluated(arguments, tmp_path, "validate", "--ckpt_path=best")
    assert code == 2
    assert "by no metric" in told
    assert "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor" in told
