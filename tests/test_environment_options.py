"""Lightning's variables of the environment: what they say holds, below files and options, or they are named."""

import inspect
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Trainer

from callbacks.commanded import command, recorded
from forked import peftlight
from peftlight.environment_options import options_of_environment


def test_each_variable_of_the_trainer_is_its_option() -> None:
    for parameter in inspect.signature(Trainer).parameters:
        options, remarks = options_of_environment("fit", {f"PL_TRAINER_{parameter.upper()}": "3"})
        assert options == [f"--trainer.{parameter}=3"]
        assert f"PL_TRAINER_{parameter.upper()}" in remarks[0]


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("PL_TRAINER_DETERMINISTIC", "True", "--trainer.deterministic=true"),
        ("PL_TRAINER_MAX_TIME", "None", "--trainer.max_time=null"),
        ("PL_TRAINER_DEVICES", "(0, 1)", "--trainer.devices=[0, 1]"),
        ("PL_TRAINER_STRATEGY", "ddp", "--trainer.strategy=ddp"),
        ("PL_FIT__OPTIMIZER__LR", "0.01", "--optimizer.lr=0.01"),
        ("PL_TRAINER__MAX_EPOCHS", "3", "--trainer.max_epochs=3"),
        ("PL_FIT__CKPT_PATH", "a.ckpt", "--ckpt_path=a.ckpt"),
        ("PL_CONFIG", "a.yaml", "--config=a.yaml"),
        ("PL_GLOBAL_SEED", "7", "--seed_everything=7"),
    ],
)
def test_values_are_read_as_lightning_reads_them(name: str, value: str, option: str) -> None:
    assert options_of_environment("fit", {name: value})[0] == [option]


def test_what_is_not_read_is_named_and_what_is_of_others_is_left_alone() -> None:
    unread = {"PL_TRAINER_MAX_EPOCH": "3", "PL_DEEPSPEED_CONFIG_PATH": "a.json", "PL_SEED_WORKERS": "0",
              "LT_PRECISION": "32"}  # fmt: skip
    left_alone = {"PL_VALIDATE__DATA__BATCH_SIZE": "3", "PL_TRAINER_MAX_STEPS": "", "PLANET": "earth"}
    options, (remark,) = options_of_environment("fit", unread | left_alone)
    assert options == []
    assert remark.startswith("set in the environment, and not read: ")
    assert all(name in remark for name in unread)
    assert not any(name in remark for name in left_alone)
    assert "Did you mean 'PL_TRAINER_MAX_EPOCHS'?" in remark


def test_a_file_of_the_environment_comes_first() -> None:
    options, _ = options_of_environment("fit", {"PL_A__B": "1", "PL_FIT__CONFIG": "a.yaml"})
    assert options == ["--config=a.yaml", "--a.b=1"]


def test_a_run_takes_them_below_its_options_and_says_so(encoder: Path, tmp_path: Path) -> None:
    environment = {
        "PL_TRAINER_MAX_STEPS": "2",
        "PL_TRAINER_MAX_EPOCHS": "9",  # the options say 1
        "PL_FIT__OPTIMIZER__LR": "0.0123",
        "PL_GLOBAL_SEED": "7",
        "PL_NOTHING": "at all",
    }
    code, told = peftlight(command(tmp_path, encoder, "nowhere"), tmp_path, environment=environment)
    assert code == 0, told
    run = recorded(tmp_path)
    config = yaml.safe_load((run["run"] / "config.yaml").read_text())
    assert config["optimizer"]["init_args"]["lr"] == 0.0123
    assert (config["trainer"]["max_steps"], config["trainer"]["max_epochs"]) == (2, 1)
    assert (run["seed"], run["steps"]) == (7, 2)
    for text in (told, (run["run"] / "log.txt").read_text()):
        assert "PL_FIT__OPTIMIZER__LR as --optimizer.lr=0.0123" in text
        assert "not read: PL_NOTHING" in text


def test_a_resume_is_of_the_run_and_not_of_the_environment(encoder: Path, tmp_path: Path) -> None:
    assert peftlight(command(tmp_path, encoder, "nowhere", **{"trainer.max_steps": 2}), tmp_path)[0] == 0
    environment = {"PL_FIT__OPTIMIZER__LR": "0.5", "PL_GLOBAL_SEED": "7"}
    more = ["--trainer.max_steps=4", "--allow_changes", "trainer.max_steps"]
    code, told = peftlight(["fit", "--resume", recorded(tmp_path)["run"], *more], tmp_path, environment=environment)
    assert code == 0, told
    assert recorded(tmp_path)["steps"] == 4
