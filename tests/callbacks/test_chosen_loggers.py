"""The user's loggers write into the run's folder and nowhere else, and know by which configuration it came about."""

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from callbacks.commanded import command, recorded
from forked import peftlight
from peftlight.callbacks.chosen_loggers import flat

WORKING = {"holding.py", "rows.tsv", "out.txt", "runs", "cache", "__pycache__"}
"""What the working folder holds after a run without further loggers."""


def logged(encoder: Path, folder: Path, logger: str) -> Path:
    """The folder of a run of two steps with that logger."""
    options = {"trainer.max_steps": 2, "trainer.log_every_n_steps": 1, "trainer.logger": logger}
    code, told = peftlight(command(folder, encoder, "nowhere", **options), folder)
    assert code == 0, told
    assert {path.name for path in folder.iterdir()} <= WORKING
    return Path(recorded(folder)["run"])


def test_csv_and_a_resume(encoder: Path, tmp_path: Path) -> None:
    run = logged(encoder, tmp_path, "CSVLogger")
    known = yaml.safe_load((run / "lightning_logs" / "version_0" / "hparams.yaml").read_text())
    assert known["model.strategy"] == "peftlight.strategies.LoRA"
    assert (known["model.strategy.rank"], known["data.batch_size"], known["trainer.max_steps"]) == (8, 2, 2)
    assert Path(known["run_folder"]).name == run.name
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]["init_args"]["save_dir"] == (
        "{run_folder}"
    )
    more = ["--trainer.max_steps=3", "--allow_changes", "trainer.max_steps"]
    code, told = peftlight(["fit", "--resume", run, *more], tmp_path)
    assert code == 0, told
    assert (run / "lightning_logs" / "version_1" / "metrics.csv").is_file()
    assert {path.name for path in tmp_path.iterdir()} <= WORKING


@pytest.mark.parametrize("place", ["mine", "."])
def test_a_place_of_the_users_own_is_kept(place: str, encoder: Path, tmp_path: Path) -> None:
    options = {"trainer.max_steps": 1, "trainer.logger": "CSVLogger", "trainer.logger.save_dir": place}
    code, told = peftlight(command(tmp_path, encoder, "nowhere", **options), tmp_path)
    assert code == 0, told
    assert (tmp_path / place / "lightning_logs" / "version_0" / "hparams.yaml").is_file()


def test_several_in_a_file(encoder: Path, tmp_path: Path) -> None:
    other = "class_path: CSVLogger, init_args: {name: other}"
    tmp_path.joinpath("two.yaml").write_text(f"trainer:\n  logger: [{{class_path: CSVLogger}}, {{{other}}}]\n")
    arguments = command(tmp_path, encoder, "nowhere", **{"trainer.max_steps": 1})
    code, told = peftlight([*arguments, "--config=two.yaml"], tmp_path)
    assert code == 0, told
    run = recorded(tmp_path)["run"]
    assert {path.parts[-3] for path in run.rglob("hparams.yaml")} == {"lightning_logs", "other"}


def test_tensorboard(encoder: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = logged(encoder, tmp_path, "TensorBoardLogger")
    place = run / "lightning_logs" / "version_0"
    written = events.EventAccumulator(str(place))
    written.Reload()
    assert {"train_loss", "lr"} <= set(written.Tags()["scalars"])
    (text,) = written.Tensors("config/text_summary")[0].tensor_proto.string_val
    assert "class_path: peftlight.strategies.LoRA" in text.decode()
    assert yaml.safe_load((place / "hparams.yaml").read_text())["model.strategy.rank"] == 8


def test_wandb(encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    options = {"trainer.max_steps": 2, "trainer.log_every_n_steps": 1, "trainer.logger": "WandbLogger"}
    arguments = [sys.executable, "-m", "peftlight", *command(tmp_path, encoder, "nowhere", **options)]
    # A process of its own: it writes when Python ends.
    subprocess.run(arguments, cwd=tmp_path, env={**os.environ, "WANDB_MODE": "offline"}, check=True)
    assert {path.name for path in tmp_path.iterdir()} <= WORKING
    run = recorded(tmp_path)["run"]
    (kept,) = run.glob("wandb/offline-run-*/run-*.wandb")
    content = kept.read_bytes()
    assert b"model.strategy.rank" in content
    assert b"train_loss" in content
    assert run.name.encode() in content


def test_mlflow(encoder: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    run = logged(encoder, tmp_path, "MLFlowLogger")
    with sqlite3.connect(run / "mlflow.db") as store:
        known = dict(store.execute("select key, value from params"))
        metrics = {key for (key,) in store.execute("select distinct key from metrics")}
    assert (known["model.strategy.rank"], Path(known["run_folder"]).name) == ("8", run.name)
    assert {"train_loss", "lr"} <= metrics


def test_the_keys_are_those_of_the_command_line() -> None:
    strategy = {"class_path": "LoRA", "init_args": {"rank": 8, "rank_pattern": {"a": 2}, "layers": [1]}}
    config = {"model": {"class_path": "M", "init_args": {"strategy": strategy}}, "trainer": {"max_epochs": 1}}
    assert flat(config) == {
        "model": "M", "model.strategy": "LoRA", "model.strategy.rank": 8, "model.strategy.rank_pattern": '{"a": 2}',
        "model.strategy.layers": "[1]", "trainer.max_epochs": 1,
    }  # fmt: skip
