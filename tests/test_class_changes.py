"""Each class that a configuration chooses has its own defaults; what a file gave for another one is kept, and said."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from parsed import Parsed
from recipes import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
TASK = ("--model=SequenceClassification", "--model.base_model=x", "--model.strategy=LoRA", "--data=SST2")
OWN = {"lr": 0.001, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False}
"""Of SGD."""
FILES = {
    "adamw.yaml": """\
        optimizer:
          class_path: AdamW
          init_args:
            lr: 0.1
            weight_decay: 0.5
            betas: [0.8, 0.9]
        """,
    "late.yaml": """\
        optimizer:
          init_args:
            momentum: 0.7
          class_path: SGD
        """,
    "rate.yaml": "optimizer:\n  init_args:\n    lr: 0.3\n",
    "own.py": """\
        from dataclasses import dataclass
        from torch.optim import SGD
        from torch.optim.lr_scheduler import LambdaLR
        from peftlight.strategies import LoRA

        class Warmed(LambdaLR):
            def __init__(self, optimizer, warmup: float = 0.5):
                super().__init__(optimizer, lambda step: 1.0)

        class Listed(SGD):
            def __init__(self, params, lr=0.01, weight_decay=(0.1, 0.2)):
                super().__init__(params, lr=lr)

        @dataclass
        class Fixed(LoRA):
            dropout: bool = False
            rank: int = 3
        """,
}


@pytest.fixture(scope="module")
def parsed() -> Parsed:
    return Parsed()


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text("\n".join(line[8:] if line.startswith(" " * 8) else line
                                               for line in text.splitlines()))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def optimizer(config: dict[str, Any]) -> dict[str, Any]:
    return {name: config["optimizer"]["init_args"][name] for name in OWN if name in config["optimizer"]["init_args"]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--optimizer=SGD"], {}),
        (["--optimizer=SGD", "--optimizer.momentum=0.9"], {"momentum": 0.9}),
        (["--optimizer.weight_decay=0.3", "--optimizer.lr=0.2", "--optimizer=SGD"], {"weight_decay": 0.3, "lr": 0.2}),
        (["--config=late.yaml"], {"momentum": 0.7}),
        (["--config=rate.yaml", "--optimizer=SGD"], {"lr": 0.3}),
        (["--optimizer=torch.optim.AdamW", "--optimizer=torch.optim.SGD"], {}),
        (["--optimizer.class_path=SGD"], {}),
    ],
)
def test_a_class_has_its_own_defaults_where_the_user_set_nothing(
    given: list[str], expected: dict[str, float], parsed: Parsed
) -> None:
    config, _ = parsed.config(*TASK, *given)
    assert optimizer(config) == {**OWN, **expected}


@pytest.mark.parametrize(
    ("given", "rate"),
    [([], 2e-4), (["--optimizer=AdamW"], 2e-4), (["--optimizer=torch.optim.AdamW"], 2e-4), (["--optimizer=Adam"], 1e-3),
     (["--optimizer=AdamW", "--optimizer.lr=0.5"], 0.5), (["--config=late.yaml", "--optimizer=AdamW"], 2e-4)],
)  # fmt: skip
def test_the_default_rate_is_adamws_alone(given: list[str], rate: float, parsed: Parsed) -> None:
    config, _ = parsed.config(*TASK, *given)
    assert config["optimizer"]["init_args"]["lr"] == rate


def test_the_default_schedule_hands_nothing_on(parsed: Parsed) -> None:
    config, said = parsed.config(*TASK, "--lr_scheduler=own.Warmed")
    assert (config["lr_scheduler"]["init_args"], said) == ({"warmup": 0.5}, [])


def test_what_a_file_set_for_another_class_is_kept_and_said(parsed: Parsed) -> None:
    config, said = parsed.config("--config=adamw.yaml", *TASK, "--optimizer=SGD")
    assert optimizer(config) == {**OWN, "lr": 0.1, "weight_decay": 0.5}
    assert said == [
        "taken over from another class: optimizer.lr 0.1 (adamw.yaml:4, for AdamW; now SGD), "
        "optimizer.weight_decay 0.5 (adamw.yaml:5, for AdamW; now SGD)"
    ]
    assert parsed.config("--config=adamw.yaml", *TASK, "--optimizer=SGD", "--optimizer.lr=2")[1] == [
        "taken over from another class: optimizer.weight_decay 0.5 (adamw.yaml:5, for AdamW; now SGD)"
    ]
    assert parsed.config("--config=late.yaml", *TASK)[1] == []
    assert parsed.config("--config=adamw.yaml", *TASK)[1] == []


def test_another_method_over_a_methods_file_says_what_it_takes(parsed: Parsed) -> None:
    file = str(CONFIGS / "lora.yaml")
    config, (said,) = parsed.config(f"--config={file}", "--model.strategy=VeRA")
    strategy = config["model"]["init_args"]["strategy"]["init_args"]
    assert (strategy["rank"], strategy["d_initial"], strategy["dropout"]) == (8, 0.1, 0.1)
    assert f"model.strategy.rank 8 ({file}:9, for LoRA; now VeRA)" in said
    assert f"optimizer.lr 0.0005 ({file}:20, for LoRA; now VeRA)" in said
    both = parsed.config(f"--config={file}", f"--config={CONFIGS / 'vera.yaml'}")[1]
    assert "optimizer" not in str(both)
    assert parsed.config(f"--config={file}", f"--config={CONFIGS / 'data' / 'alpaca.yaml'}")[1] == []


def test_other_data_over_a_files_data_says_what_it_takes(parsed: Parsed) -> None:
    config, (said,) = parsed.config(f"--config={CONFIGS / 'lora.yaml'}", "--data=Alpaca")
    data = config["data"]["init_args"]
    assert (data["source"], data["max_length"], data["batch_size"]) == ("tatsu-lab/alpaca", 1024, 32)
    assert "data.batch_size 32" in said
    assert "for SST2; now Alpaca" in said


def test_what_another_class_cannot_take_is_said_too(parsed: Parsed) -> None:
    config, (said,) = parsed.config("--config=adamw.yaml", *TASK, "--optimizer=own.Listed")
    assert config["optimizer"]["init_args"] == {"lr": 0.1, "weight_decay": [0.1, 0.2]}
    assert (
        "optimizer.weight_decay 0.5 (adamw.yaml:5, for AdamW; now Listed, which does not take it: left at [0.1, "
        in said
    )
    config, (said,) = parsed.config(f"--config={CONFIGS / 'lora.yaml'}", "--model.strategy=own.Fixed")
    assert config["model"]["init_args"]["strategy"]["init_args"]["dropout"] is False
    assert "model.strategy.dropout 0.1" in said
    assert "which does not take it: left at False" in said


def test_the_defaults_in_a_resolved_configuration_are_not_the_users(parsed: Parsed) -> None:
    """That of a run lists every key."""
    config, _ = parsed.config(f"--config={CONFIGS / 'lora.yaml'}", "--model.strategy.use_rslora=true")
    Path("run.yaml").write_text(yaml.safe_dump(config))
    config, (said,) = parsed.config("--config=run.yaml", "--optimizer=SGD", "--model.strategy=own.Fixed")
    assert optimizer(config) == {**OWN, "lr": 0.0005}
    strategy = config["model"]["init_args"]["strategy"]["init_args"]
    assert (strategy["rank"], strategy["use_rslora"]) == (3, True)
    assert "weight_decay" not in said
    assert "rank " not in said
    assert parsed._cli.config.fit.model.init_args.optimizer == parsed._cli.config.fit.optimizer
