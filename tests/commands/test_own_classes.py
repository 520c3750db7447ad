"""Classes of the user's own, after their training: imported by every command where they are named, and only there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forked import peftlight
from recipes import CONFIGS

METHOD = '''
from dataclasses import dataclass

import torch
from torch import nn

from peftlight import PEFTStrategy
from peftlight.delta import Delta
from peftlight.linear import widths
from peftlight.targets import select


@dataclass
class Core(PEFTStrategy):
    """Random frozen factors, and a small matrix between them."""

    size: int = 2
    target_modules: str | list[str] | None = "attention"

    def deltas(self, model):
        for name, layer in select(model, self.target_modules, (nn.Linear,)).modules.items():
            yield name, Between(*widths(layer), self.size)


class Between(Delta):
    def __init__(self, inputs, outputs, size):
        super().__init__()
        self.register_buffer("down", torch.randn(size, inputs))
        self.register_buffer("up", torch.randn(outputs, size))
        self.core = nn.Parameter(torch.zeros(size, size))

    def forward(self, base, x):
        return base(x) + x @ self.down.T @ self.core.T @ self.up.T

    def factors(self):
        return self.down, self.up @ self.core
'''
TASK = """
from enum import Enum

import torch
from peftlight.tasks import SequenceClassification


class Sides(Enum):
    one = 1
    both = 2


class Weighted(SequenceClassification):
    def __init__(self, *args, class_weights: list[float] = [1.0, 1.0], sides: Sides = Sides.one, **kw):
        super().__init__(*args, **kw)
        self.class_weights, self.sides = class_weights, sides

    def loss(self, batch):
        weights, labels = torch.tensor(self.class_weights), batch["labels"]
        lost = torch.nn.functional.cross_entropy(self.logits(batch), labels, weight=weights, reduction="sum")
        return lost, weights[labels].sum()

    def report(self, stage):
        super().report(stage)
        self.log_whole({f"{stage}_told": torch.tensor(self.class_weights[1] * self.sides.value)})
"""
WATCHER = "from lightning.pytorch import Callback\n\n\nclass Watcher(Callback):\n    pass\n"


def trained(folder: Path, base: Path, overlay: str, *options: object, strategy: str = "method.Core") -> Path:
    """The run that `fit` makes in a folder with the user's files."""
    flags = {"model.strategy": strategy, "model.base_model": base, "trainer.callbacks+": "watcher.Watcher",
             "trainer.max_epochs": 1, "trainer.limit_train_batches": 3, "trainer.log_every_n_steps": 1,
             "trainer.accelerator": "cpu", "trainer.default_root_dir": "runs", "optimizer.lr": 0.1}  # fmt: skip
    given = [f"--config={CONFIGS / name}.yaml" for name in ("lora", f"data/{overlay}")]
    given += [f"--{name}={value}" for name, value in flags.items()]
    code, said = peftlight(["fit", *given, *options], folder)
    assert code == 0, said
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the user's files, in which the trainings are."""
    folder = tmp_path_factory.mktemp("here")
    for name, text in (("method", METHOD), ("weighted", TASK), ("watcher", WATCHER)):
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture(scope="module")
def classifier(here: Path, encoder: Path) -> Path:
    (here / "one").mkdir()
    for name in ("method", "weighted", "watcher"):
        shutil.copy(here / f"{name}.py", here / "one")
    # its options are given at once: jsonargparse takes the parent's and the class's own
    options = ["--model=weighted.Weighted", "--model.class_weights=[1, 4]", "--model.sides=both",
               "--data.source=sample:sentiment"]  # fmt: skip
    return trained(here / "one", encoder, "sst2", *options)


@pytest.fixture(scope="module")
def writer(here: Path, decoder: Path) -> Path:
    (here / "two").mkdir()
    for name in ("method", "watcher"):
        shutil.copy(here / f"{name}.py", here / "two")
    return trained(here / "two", decoder, "english_quotes", "--data.source=sample:quotes")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder to work in without the user's files."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


def imported(*files: Path) -> list[str]:
    return [word for file in files for word in ("--import", str(file))]


def test_every_command_uses_an_adapter_of_ones_own(here: Path, writer: Path, elsewhere: Path) -> None:
    for words in (
        ["evaluate", writer, "--limit", 4],
        ["inspect", writer],
        ["diff", writer, f"other={writer}"],
        ["combine", writer, f"other={writer}:0.5", "combined"],
        ["merge", writer, "merged"],
        ["generate", writer, "--prompt", "a film", "--max_new_tokens", 2],
        ["chat", writer],
    ):
        code, said = peftlight([*words, *imported(here / "method.py")], elsewhere)
        assert code == 0, (words, said)
    code, said = peftlight(["inspect", "combined"], elsewhere)
    assert code == 0, said  # a sum of products of matrices is a LoRA, and needs no class of the user's


def test_the_task_of_ones_own_measures_and_predicts_with_its_options(
    here: Path, classifier: Path, elsewhere: Path
) -> None:
    own = imported(here / "method.py", here / "weighted.py")
    code, said = peftlight(["evaluate", classifier, "--json", "figures.json", *own], elsewhere)
    assert code == 0, said
    found = json.loads((elsewhere / "figures.json").read_text())["rows"][1]["metrics"]
    recorded = json.loads((classifier / "run.json").read_text())["metrics"]
    assert found["told"] == recorded["val_told"] == 8
    assert found["loss"] == pytest.approx(recorded["val_loss"], rel=1e-5)
    (elsewhere / "rows.jsonl").write_text('{"sentence": "a film"}\n')
    code, said = peftlight(["predict", classifier, "rows.jsonl", "--out", "answers.jsonl", *own], elsewhere)
    assert code == 0, said
    assert json.loads((elsewhere / "answers.jsonl").read_text())["label"] in ("negative", "positive")
    shutil.copytree(classifier / "adapter", elsewhere / "alone")
    given = ["--data", "SST2", "--source", "sample:sentiment"]
    code, said = peftlight(["evaluate", "alone", *given, *own], elsewhere)
    assert code == 2, said  # with the defaults of its options it would measure something else
    assert "class_weights" in said
    assert "--config FILE" in said
    code, said = peftlight(["evaluate", "alone", *own, "--config", classifier / "config.yaml"], elsewhere)
    assert code == 0, said


def test_the_error_says_what_to_type_and_that_is_right(here: Path, classifier: Path, elsewhere: Path) -> None:
    code, said = peftlight(["evaluate", classifier, "--limit", 4], here)
    assert code == 2
    for _ in ("method.py", "weighted.py"):
        line = said.rstrip().splitlines()[-1].split()
        assert line[0] == "peftlight", said
        code, said = peftlight(line[1:], here)
    assert code == 0, said
    code, said = peftlight(["merge", classifier, "merged"], elsewhere)
    assert code == 2
    assert said.rstrip().endswith(f"peftlight merge {classifier} merged --import FOLDER/method.py")


def test_the_record_names_the_files_and_no_folder(here: Path, classifier: Path) -> None:
    record = json.loads((classifier / "adapter" / "peftlight.json").read_text())
    assert record["task"] == "weighted.Weighted"
    expected = {"method.Core": "method.py", "weighted.Weighted": "weighted.py"}
    assert record["defined_in"] == json.loads((classifier / "run.json").read_text())["defined_in"] == expected
    assert str(here) not in (classifier / "adapter" / "peftlight.json").read_text()
    card = (classifier / "adapter" / "README.md").read_text()
    assert "peftlight predict ADAPTER FILE --import method.py --import weighted.py" in card


def test_what_is_not_used_need_not_be_there(here: Path, classifier: Path, elsewhere: Path) -> None:
    """The data is given, so that of the run is not looked for; its callback never is."""
    text = (classifier / "config.yaml").read_text().replace("peftlight.data.SST2", "gone.Rows")
    shutil.copytree(classifier, elsewhere / "run")
    (elsewhere / "run" / "config.yaml").write_text(text)
    assert "gone.Rows" in text
    own = imported(here / "method.py", here / "weighted.py")
    code, said = peftlight(["evaluate", "run", *own], elsewhere)
    assert code == 2, said
    assert "gone.Rows" in said
    given = ["--data", "SST2", "--source", "sample:sentiment", "--limit", 4]
    code, said = peftlight(["evaluate", "run", *own, *given], elsewhere)
    assert code == 0, said


@pytest.mark.parametrize("path", ["method.Core", "subprocess.Popen", "evil.sub.Evil"])
def test_no_file_of_an_adapter_has_code_imported(path: str, classifier: Path, elsewhere: Path) -> None:
    """As strategy, task and data, and as what the record says: a file of that name lies in the working folder."""
    for name in ("evil", "method", "antigravity"):
        (elsewhere / f"{name}.py").write_text("open('ran', 'w').close()\n")
    run = elsewhere / "run"
    for change in ("strategy", "task", "data", "record"):
        shutil.copytree(classifier, run, dirs_exist_ok=True)
        config, record = (run / "adapter" / name for name in ("adapter_config.json", "peftlight.json"))
        told = json.loads(record.read_text())
        if change == "strategy":
            content = json.loads(config.read_text())
            content["strategy"]["class_path"] = path
            config.write_text(json.dumps(content))
        elif change == "record":
            told |= {"task": path, "defined_in": {path: "evil.py", "antigravity": "antigravity"}}
        else:
            was = {"task": "weighted.Weighted", "data": "peftlight.data.SST2"}[change]
            (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(was, path))
        record.write_text(json.dumps(told))
        for words in (["evaluate", "run"], ["predict", "run/adapter", "rows.jsonl"], ["inspect", "run"]):
            code, said = peftlight(words, elsewhere)
            assert code == 2, said
            assert "unexpected" not in said
    assert not (elsewhere / "ran").exists()


def test_lightnings_commands_take_the_option(here: Path, classifier: Path, elsewhere: Path) -> None:
    """Where the files lie elsewhere: validate by the checkpoint, a resume, and an initial adapter."""
    own = imported(*(here / f"{name}.py" for name in ("method", "weighted", "watcher")))
    shutil.copytree(classifier, elsewhere / "run")
    config = ["--config", "run/config.yaml", "--trainer.default_root_dir", "runs"]
    code, said = peftlight(["validate", *config, "--ckpt_path", "run/checkpoints/last.ckpt", *own], elsewhere)
    assert code == 0, said
    (validated,) = (elsewhere / "runs").iterdir()
    recorded = json.loads((classifier / "run.json").read_text())["metrics"]
    assert json.loads((validated / "run.json").read_text())["metrics"]["val_loss"] == recorded["val_loss"]
    code, said = peftlight(["fit", "--resume", "run", "--trainer.max_epochs", "2", "--allow_changes",
                            "trainer.max_epochs", *own], elsewhere)  # fmt: skip
    assert code == 0, said
    code, said = peftlight(["fit", *config, "--init_adapter", classifier, *own], elsewhere)
    assert code == 0, said
    code, said = peftlight(["fit", *config], elsewhere)
    assert code == 2, said
    assert "or name its file: --import FOLDER/weighted.py" in said


@pytest.mark.slow
def test_the_proofs_take_it_too(here: Path, classifier: Path, elsewhere: Path) -> None:
    """They train in processes of their own."""
    own = imported(*(here / f"{name}.py" for name in ("method", "weighted", "watcher")))
    code, said = peftlight(["replay", classifier, "--steps", 1, *own], elsewhere)
    assert code == 0, said
    code, said = peftlight(["verify", "merge", "--config", classifier / "config.yaml", "--steps", 1, *own], elsewhere)
    assert code == 0, said


BROKEN = {
    "syntax": ("def f(:\n", ["broken.py:1: invalid syntax"]),
    "name": ("\n\nx = not_there\n", ["broken.py:3: NameError", "not_there"]),
    "missing": ("import not_there_at_all\n", ["broken.py:1: ModuleNotFoundError", "not_there_at_all"]),
    "exit": ("import sys\nsys.exit(0)\n", ["broken.py:2: it ends the program"]),
    "field": (
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: list = []\n",
        ["broken.py:2: ValueError"],
    ),
}
"""A file and what is said of it."""


def test_a_file_that_cannot_be_imported_is_named_with_its_line(here: Path, classifier: Path, elsewhere: Path) -> None:
    for text, says in BROKEN.values():
        (elsewhere / "broken.py").write_text(text)
        code, said = peftlight(["evaluate", classifier, "--import", "broken.py"], elsewhere)
        assert code == 2, said
        for words in says:
            assert words in said


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("metod.py", "no such file. Did you mean 'method.py'"),
        ("metod", "no module 'metod' here or among the installed packages. Did you mean 'method'"),
        ("two/method.py", "a module method is known already"),
        ("json.py", "a module json is known already"),
        ("lora-xs.py", "'lora-xs' cannot be a module's name"),
        ("method.ipynb", "expected a Python file"),
        ("packed/gone.py", "no such file"),
        ("", "--import needs a Python file"),
    ],
)
def test_what_cannot_be_meant_is_refused(name: str, says: str, classifier: Path, elsewhere: Path) -> None:
    (elsewhere / "two").mkdir()
    for file in ("method.py", "two/method.py", "json.py", "lora-xs.py", "method.ipynb"):
        (elsewhere / file).write_text("")
    code, said = peftlight(["evaluate", classifier, "--import", name], elsewhere)
    assert code == 2
    assert says in said
    assert "unexpected" not in said


def test_a_module_within_a_package_keeps_its_path(here: Path, encoder: Path, tmp_path: Path, elsewhere: Path) -> None:
    package = tmp_path / "mine"
    (package / "deep").mkdir(parents=True)
    for file in ("__init__.py", "deep/__init__.py"):
        (package / file).write_text("")
    (package / "deep" / "helper.py").write_text(METHOD)
    (package / "deep" / "method.py").write_text("from .helper import *\nfrom .helper import Core\n")
    shutil.copy(here / "watcher.py", tmp_path)
    run = trained(tmp_path, encoder, "sst2", "--data.source=sample:sentiment", strategy="mine.deep.method.Core")
    record = json.loads((run / "adapter" / "peftlight.json").read_text())
    assert record["defined_in"] == {"mine.deep.helper.Core": "mine.deep.helper"}
    line = ["evaluate", run, "--limit", "4"]
    for name, code in {"mine.deep.method": 0, "mine/deep/method.py": 0, "mine": 2, "mine/deep": 2}.items():
        assert peftlight([*line, "--import", name], tmp_path)[0] == code, name
    code, said = peftlight([*line, "--import", package / "deep" / "helper.py"], elsewhere)
    assert code == 0, said
    code, said = peftlight(line, tmp_path)
    assert said.rstrip().endswith("--import mine.deep.helper")


SCRIPT = """
import sys
from dataclasses import dataclass
from peftlight import attach, save_adapter
from peftlight.strategies import LoRA
from peftlight.testing.models import make


@dataclass
class Gained(LoRA):
    gain: float = 2.0


if __name__ == "__main__":
    model = make("bert")
    model.save_pretrained("base")
    save_adapter(attach(model, Gained(rank=2, gain=3.0)), "saved")
"""


@pytest.mark.parametrize("how", ["script", "notebook"])
def test_a_class_of_a_program_that_ran_is_found_in_its_file(how: str, elsewhere: Path) -> None:
    (elsewhere / "gained.py").write_text(SCRIPT)
    given = [str(elsewhere / "gained.py")] if how == "script" else ["-"]  # of the latter, as of a notebook, no file is
    done = subprocess.run([sys.executable, *given], cwd=elsewhere, input=SCRIPT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    path = json.loads((elsewhere / "saved" / "adapter_config.json").read_text())["strategy"]["class_path"]
    assert path == {"script": "gained.Gained", "notebook": "__main__.Gained"}[how]
    line = ["inspect", "saved", "--base", "base"]
    code, said = peftlight(line, elsewhere)
    assert code == 2
    file = {"script": "gained.py", "notebook": "FILE.py"}[how]
    assert said.rstrip().endswith(f"peftlight inspect saved --base base --import {file}")
    code, said = peftlight([*line, "--json", "facts.json", "--import", "gained.py"], elsewhere)
    assert code == 0, said
    assert json.loads((elsewhere / "facts.json").read_text())["method"] == "Gained"


def test_code_that_fails_in_a_training_is_named_with_its_line(here: Path, elsewhere: Path, encoder: Path) -> None:
    (elsewhere / "method.py").write_text(METHOD.replace("for name, layer in select(", "for name, layer in not_there("))
    flags = ["--model.strategy=method.Core", f"--model.base_model={encoder}", "--data.source=sample:sentiment"]
    config = [f"--config={CONFIGS / name}.yaml" for name in ("lora", "data/sst2")]
    code, said = peftlight(["fit", *config, *flags, "--trainer.accelerator=cpu"], elsewhere)
    line = 1 + METHOD[: METHOD.index("for name, layer in select(")].count("\n")
    assert code == 1
    assert f"error in {elsewhere / 'method.py'}:{line}: NameError" in said
    for given, means in (("method.py", "method.CLASS"), ("./method.Core", "method.Core")):
        code, said = peftlight(["fit", *config, f"--model.strategy={given}"], elsewhere)
        assert code == 2
        assert f"name the class in it: --model.strategy {means}" in said
    code, said = peftlight(["fit", *config, f"--model.strategy={here}/method.py:Core"], elsewhere)
    assert f"--model.strategy method.Core --import {here}/method.py" in said


def test_the_help_names_the_option_and_imports_nothing(elsewhere: Path) -> None:
    (elsewhere / "loud.py").write_text("open('ran', 'w').close()\n")
    commands = ("evaluate", "predict adapter", "inspect", "merge", "diff", "combine", "generate", "chat", "push")
    for command in (*commands, "verify", "replay"):
        code, said = peftlight([*command.split(), "--help", "--import", "loud.py"], elsewhere)
        assert code == 0, said
        assert "--import FILE_OR_MODULE" in said
    assert "--import FILE_OR_MODULE" in peftlight(["fit", "--help"], elsewhere)[1]
    assert not (elsewhere / "ran").exists()
