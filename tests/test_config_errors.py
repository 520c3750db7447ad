"""Every error of a configuration is one short screen that names the file and line, and the nearest right spelling."""

import argparse
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from peftlight import cli
from peftlight.config_errors.dropped import refuse_dropped
from peftlight.errors import UserError

BASE = """\
seed_everything: 42
model:
  class_path: SequenceClassification
  init_args:
    base_model: some/model
    strategy:
      class_path: LoRA
      init_args:
        rank: 8
        alpha: 16
        target_modules: attention
data:
  class_path: SST2
  init_args:
    source: sample:sentiment
    batch_size: 16
optimizer:
  class_path: AdamW
  init_args:
    lr: 2e-3
trainer:
  max_epochs: 5
  callbacks:
    - class_path: ShowPredictions
      init_args:
        texts:
          - The soup was cold.
"""
FILES = {
    "lora.yaml": BASE,
    "model.yaml": """\
        class_path: CausalLM
        init_args:
          base_model: x
          strategy:
            class_path: LoRA
            init_args:
              rnk: 3
        """,
    "strategy.yaml": "class_path: LoRA\ninit_args:\n  rnk: 3\n",
    "data.yaml": "class_path: SST2\ninit_args:\n  batch_sise: 3\n",
    "trainer.yaml": "accelerator: cpu\nmax_epocs: 3\n",
    "epochs.yaml": "accelerator: cpu\nmax_epochs: three\n",
    "loop.yaml": "trainer: loop.yaml\n",
    "second.yaml": "# only this\ntrainer:\n  max_epocs: 3\n",
    "rank.yaml": "model:\n  init_args:\n    strategy:\n      init_args:\n        rank: eight\n",
    "raising_module.py": "1 / 0\n",
    "broken_module.py": "def f(:\n",
    "needy_module.py": "import surely_not_installed\n",
    "own_strategies.py": """\
        from dataclasses import dataclass
        from peftlight.strategies import LoRA

        class Other: pass

        @dataclass
        class Even(LoRA):
            def __post_init__(self):
                raise ValueError(f"an even rank, please: rank is {self.rank}")
        """,
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")
NOISE = ("Traceback", "usage:", "Union", "Namespace", "NestedArg", "NoneType", "<class", "Parser key")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in FILES.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def _told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("peftlight: error: "))
    told = "\n".join(lines[start:])
    assert len(lines) - start <= 6, told
    assert not [word for word in NOISE if word in told], told
    return told.removeprefix("peftlight: error: ")


COMMAND_LINE = [
    ("--model.strategy.rnk 3", "--model.strategy.rnk: LoRA has no 'rnk'. Did you mean 'rank'?"),
    ("--model.strategy.init_args.rnk 3", "--model.strategy.init_args.rnk: LoRA has no 'rnk'. Did you mean 'rank'?"),
    ("--model.strategy LoRa", "--model.strategy: there is no class 'LoRa'. Did you mean 'LoRA'?"),
    ("--model.strategy=LoRa", "--model.strategy: there is no class 'LoRa'. Did you mean 'LoRA'?"),
    ("--model.strategy no_module.LoRA", "no_module.LoRA is not found: there is no module 'no_module'."),
    ("--model Sequenceclassification", "--model: there is no class 'Sequenceclassification'."),
    ("--model.base_modle x", "SequenceClassification has no 'base_modle'. Did you mean 'base_model'"),
    ("--model.rank 3", "--model.rank: SequenceClassification has no 'rank'. Did you mean --model.strategy.rank?"),
    ("--model.dtype float31", "one of float32, bfloat16, float16, auto, not 'float31'. Did you mean 'float32'"),
    ("--model.optimizer AdamW", "--model.optimizer: optimizer is a key of the top level"),
    ("--model.strategy.rank x", "--model.strategy.rank: must be a whole number, not 'x'."),
    ("--model.strategy.rank 0", "--model.strategy.rank: LoRA needs a rank of at least 1; rank is 0."),
    ("--model.strategy.rank", "--model.strategy.rank: a value is missing after it."),
    ("--model.strategy.bias some", "--model.strategy.bias: must be one of none, all, lora_only, not 'some'."),
    ("--model.help Foo", "--model.help: there is no class 'Foo'."),
    ("--modle x", "--modle: there is no key 'modle'. Did you mean 'model'?"),
    ("--rank 3", "--rank: there is no key 'rank'. Did you mean --model.strategy.rank?"),
    ("--batch_sise 3", "--batch_sise: there is no key 'batch_sise'. Did you mean --data.batch_size?"),
    ("--learning_rate 3", "Did you mean --optimizer.lr?"),
    ("--tariner.max_epochs=3", "--tariner.max_epochs: there is no key 'tariner'. Did you mean 'trainer'?"),
    ("stray", "'stray' belongs to no option"),
    ("--trainer.max_epochs three", "--trainer.max_epochs: must be a whole number or null, not 'three'."),
    ("--trainer.max_epocs 3", "--trainer.max_epocs: Trainer has no 'max_epocs'. Did you mean 'max_epochs'"),
    ("--trainer.max_epoch 3", "--trainer.max_epoch: Trainer has no 'max_epoch'. Did you mean 'max_epochs'"),
    ("--trainer.precision 17", "bf16-mixed"),
    ("--trainer.accelerator gpuu", "--trainer.accelerator: there is no accelerator 'gpuu'."),
    ("--trainer.strategy dddp", "--trainer.strategy: there is no strategy 'dddp'. Did you mean 'ddp'?"),
    ("--trainer.devices 0", "--trainer.devices: "),
    ("--trainer.callbacks ShowPredictions", "trainer.callbacks would replace the callbacks of lora.yaml:"),
    ("--trainer.callbacks+ ShowPredictionz", "Did you mean 'ShowPredictions'"),
    ("--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr=x", "EarlyStopping has no 'monitr'. Did you mean"),
    ("--trainer.logger Foo", "--trainer.logger: there is no class 'Foo'."),
    ("--trainer 3", "--trainer: trainer holds keys"),
    ("--optimizer Adamw", "--optimizer: there is no class 'Adamw'. Did you mean 'AdamW'?"),
    ("--optimizer.lrr 3", "--optimizer.lrr: AdamW has no 'lrr'. Did you mean 'lr'?"),
    ("--optimizer.lr fast", "--optimizer.lr: must be a number, not 'fast'."),
    ("--lr_scheduler Linear", "Did you mean 'LinearLR' or 'LinearWarmup'?"),
    ("--lr_scheduler.warmupp 3", "--lr_scheduler.warmupp: LinearWarmup has no 'warmupp'. Did you mean 'warmup'?"),
    ("--data SST3", "--data: there is no class 'SST3'. Did you mean 'SST2'?"),
    ("--data.batch_sise 3", "--data.batch_sise: SST2 has no 'batch_sise'. Did you mean 'batch_size'"),
    ("--data.batch_size 0", "--data.batch_size: batch_size must be at least 1; it is 0."),
    ("--seed_everything x", "--seed_everything: must be true or false or a whole number, not 'x'."),
    ("--ckpt_path", "--ckpt_path: a value is missing after it."),
    ("--config", "--config: a value is missing after it."),
    ("--config lorra.yaml", "There is no file lorra.yaml. Did you mean 'lora.yaml'"),
    ("--config .", ". is a folder, not a YAML file."),
    ("--config second.yaml", "second.yaml:3: Trainer has no 'max_epocs'. Did you mean 'max_epochs'"),
    ("--config rank.yaml", "rank.yaml:5: model.strategy.rank: must be a whole number, not 'eight'."),
    ("--model model.yaml", "model.yaml:7: LoRA has no 'rnk'. Did you mean 'rank'?"),
    ("--model nowhere.yaml", "There is no file nowhere.yaml."),
    ("--model.strategy strategy.yaml", "strategy.yaml:3: LoRA has no 'rnk'. Did you mean 'rank'?"),
    ("--data data.yaml", "data.yaml:3: SST2 has no 'batch_sise'. Did you mean 'batch_size'"),
    ("--trainer trainer.yaml", "trainer.yaml:2: Trainer has no 'max_epocs'. Did you mean 'max_epochs'"),
    ("--trainer loop.yaml", "loop.yaml:1: Trainer has no 'trainer'. It belongs at the top level."),
    ("--trainer epochs.yaml", "epochs.yaml:2: trainer.max_epochs: must be a whole number or null, not 'three'."),
]


@pytest.mark.parametrize(("options", "expected"), COMMAND_LINE, ids=[options for options, _ in COMMAND_LINE])
def test_an_error_on_the_command_line(options: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in _told(["fit", "--config", "lora.yaml", *options.split()], capsys)


STRATEGY = "    strategy:\n      class_path: LoRA\n      init_args:\n        rank: 8\n        alpha: 16\n"
IN_A_FILE = {
    "top-level key": ("model:\n", "modle:\n", "c.yaml:2: there is no key 'modle'. Did you mean 'model'?"),
    "nested key": ("rank: 8", "rnk: 8", "c.yaml:9: LoRA has no 'rnk'. Did you mean 'rank'?"),
    "trainer key": ("max_epochs:", "max_epoch:", "c.yaml:22: Trainer has no 'max_epoch'. Did you mean 'max_epochs'"),
    "other name": (
        "max_epochs:",
        "num_train_epochs:",
        "c.yaml:22: Trainer has no 'num_train_epochs'. Did you mean 'max_",
    ),
    "command as a key": ("seed_everything: 42", "fit: {seed_everything: 42}", "c.yaml:1: there is no key 'fit'."),
    "one level high": (
        "    strategy:\n",
        "    rank: 4\n    strategy:\n",
        "c.yaml:6: SequenceClassification has no 'rank'. It belongs under 'model: init_args: strategy: init",
    ),
    "one level low": (
        "rank: 8",
        "base_model: x",
        "c.yaml:9: LoRA has no 'base_model'. It belongs under 'model: init_args:'",
    ),
    "wrong branch": ("    strategy:\n", "    batch_size: 4\n    strategy:\n", "It belongs under 'data: init_args:'."),
    "strategy on top": (
        "data:\n",
        "strategy: LoRA\ndata:\n",
        "c.yaml:12: there is no key 'strategy'. It belongs under 'mod",
    ),
    "without effect": (
        "    strategy:\n",
        "    optimizer: AdamW\n    strategy:\n",
        "c.yaml:6: optimizer is a key of the top",
    ),
    "class in wrong case": (
        "class_path: LoRA",
        "class_path: LoRa",
        "c.yaml:7: model.strategy.class_path: there is no class 'LoRa'. Did you mean 'LoRA'?",
    ),
    "class misspelt": ("SequenceClassification", "SequenceClasification", "Did you mean 'SequenceClassification'"),
    "ambiguous class": (
        "trainer:\n",
        "lr_scheduler: {class_path: ReduceLROnPlateau}\ntrainer:\n",
        "torch.optim.lr_scheduler.ReduceLROnPlateau",
    ),
    "no such module": (
        "class_path: LoRA",
        "class_path: no_module.Mine",
        "c.yaml:7: model.strategy.class_path: no_module.Mine",
    ),
    "no such submodule": (
        "class_path: LoRA",
        "class_path: peftlight.nope.Mine",
        "there is no module 'peftlight.nope'.",
    ),
    "no such class in a module": (
        "class_path: LoRA",
        "class_path: own_strategies.Evem",
        "no class 'Evem'. Did you mean 'Even'?",
    ),
    "another kind of class": (
        "class_path: LoRA",
        "class_path: own_strategies.Other",
        "own_strategies.Other is not a PEFTStrategy.",
    ),
    "module raises": (
        "class_path: LoRA",
        "class_path: raising_module.A",
        "ZeroDivisionError: division by zero (raising_module.py:1)",
    ),
    "module has a slip": (
        "class_path: LoRA",
        "class_path: broken_module.A",
        "c.yaml:7: broken_module.A is found, but its module",
    ),
    "module lacks another": (
        "class_path: LoRA",
        "class_path: needy_module.A",
        "No module named 'surely_not_installed'",
    ),
    "own class refuses": (
        "class_path: LoRA",
        "class_path: own_strategies.Even",
        "c.yaml:9: ValueError: an even rank, please",
    ),
    "number in words": (
        "rank: 8",
        "rank: eight",
        "c.yaml:9: model.strategy.rank: must be a whole number, not 'eight'.",
    ),
    "fraction": ("rank: 8", "rank: 8.5", "c.yaml:9: model.strategy.rank: must be a whole number, not '8.5'."),
    "number for names": (
        "target_modules: attention",
        "target_modules: 3",
        "c.yaml:11: model.strategy.target_modules: must be text or a list or null, not '3'.",
    ),
    "none of the choices": (
        "rank: 8",
        "bias: some",
        "c.yaml:9: model.strategy.bias: must be one of none, all, lora_only, not",
    ),
    "inside a mapping": (
        "rank: 8",
        "rank_pattern: {q: x}",
        "c.yaml:9: model.strategy.rank_pattern.q: must be a whole number",
    ),
    "list for a mapping": ("batch_size: 16", "columns: [a]", "c.yaml:16: data.columns: must be keys with values"),
    "refused by a class": ("rank: 8", "rank: 0", "c.yaml:9: LoRA needs a rank of at least 1; rank is 0."),
    "refused by the data": ("batch_size: 16", "validation_size: 2.5", "c.yaml:16: validation_size must be a share"),
    "no class_path": (
        STRATEGY,
        "    strategy:\n      rank: 8\n      alpha: 16\n      dummy: \n",
        "c.yaml:6: model.strategy: it does not say which class this is.\n  Add class_path: LoRA",
    ),
    "class_path misspelt": (
        "class_path: LoRA",
        "clas_path: LoRA",
        "c.yaml:7: 'clas_path' cannot stand here. Did you mean 'class_",
    ),
    "init_args misspelt": (
        "LoRA\n      init_args:",
        "LoRA\n      init_arg:",
        "c.yaml:8: 'init_arg' cannot stand beside class_path.",
    ),
    "beside class_path": (
        "LoRA\n      init_args:\n        rank: 8\n        alpha: 16\n        target_modules: attention",
        "LoRA\n      rank: 8",
        "c.yaml:8: 'rank' cannot stand beside class_path. Put it under init_args.",
    ),
    "empty value": (
        STRATEGY + "        target_modules: attention\n",
        "    strategy:\n",
        "c.yaml:6: SequenceClassification needs model.strategy",
    ),
    "missing": (
        STRATEGY + "        target_modules: attention\n",
        "",
        "c.yaml:3: SequenceClassification needs model.strategy.",
    ),
    "value left out": ("rank: 8", "rank:", "c.yaml:9: model.strategy.rank must be a whole number, and is empty."),
    "class_path is a number": ("class_path: LoRA", "class_path: 3", "c.yaml:7: '3' is not the name of a class."),
    "space in a key": ("rank: 8", "ra nk: 8", "c.yaml:9: the key 'ra nk' has a space in it."),
    "quote in a key": ("rank: 8", "ra'nk: 8", "c.yaml:9: LoRA has no 'ra'nk'. Did you mean 'rank'?"),
    "init_args left empty": ("    lr: 2e-3\n", "", "c.yaml:19: init_args holds keys, and has nothing."),
    "init_args is a list": ("    lr: 2e-3", "    - lr: 2e-3", "c.yaml:19: init_args holds keys, and has a list."),
    "list for keys": (
        "trainer:\n  max_epochs: 5\n  callbacks:",
        "trainer:\n  - max_epochs: 5\n  - callbacks:",
        "leave out the dashes",
    ),
    "unknown callback": (
        "ShowPredictions",
        "ShowPredictionz",
        "c.yaml:24: trainer.callbacks.class_path: there is no class",
    ),
    "key of a callback": ("texts:", "textz:", "c.yaml:26: ShowPredictions has no 'textz'. Did you mean 'texts'?"),
    "second callback": (
        "  callbacks:\n",
        "  callbacks:\n    - {class_path: LearningRateMonitor, init_args: {logging_interva: step}}\n",
        "c.yaml:24: LearningRateMonitor has no 'logging_interva'. Did you mean 'logging_interval'?",
    ),
    "item of a list": ("- The soup was cold.", "- [a, b]", "trainer.callbacks.texts: must be text, not"),
    "accelerator": (
        "max_epochs: 5",
        "accelerator: gpuu",
        "c.yaml:22: trainer.accelerator: there is no accelerator 'gpuu'.",
    ),
    "trainer's strategy": (
        "max_epochs: 5",
        "strategy: dddp",
        "c.yaml:22: trainer.strategy: there is no strategy 'dddp'.",
    ),
    "trainer refuses": ("max_epochs: 5", "val_check_interval: 7.5", "c.yaml:22: "),
    "given twice": (
        "alpha: 16\n",
        "alpha: 16\n        rank: 4\n",
        "c.yaml:11: 'rank' is given twice, first on line 9.",
    ),
    "tab": ("    base_model", "\tbase_model", "c.yaml:5: this line is not YAML: a tab is in its indentation"),
    "bad indentation": ("    base_model", "      base_model", "c.yaml:6: this line is not YAML: its indentation"),
    "unclosed bracket": ("rank: 8", "rank: [8", "c.yaml:10: this line is not YAML"),
    "second colon": ("rank: 8", "rank: alpha: 8", "c.yaml:9: this line is not YAML: a ':' where none can be"),
    "unknown alias": ("rank: 8", "rank: *eight", "c.yaml:9: this line is not YAML"),
    "two documents": ("data:\n", "---\ndata:\n", "c.yaml:12: this line is not YAML: a second document begins"),
    "included file": (
        "trainer:\n  max_epochs: 5\n",
        "trainer: trainer.yaml\nx:\n",
        "trainer.yaml:2: Trainer has no 'max_epocs'.",
    ),
}


@pytest.mark.parametrize(("old", "new", "expected"), IN_A_FILE.values(), ids=IN_A_FILE)
def test_an_error_in_a_file(old: str, new: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert old in BASE
    Path("c.yaml").write_text(BASE.replace(old, new, 1))
    assert expected in _told(["fit", "--config", "c.yaml"], capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "c.yaml is empty."),
        (b"# only a comment\n", "c.yaml is empty."),
        (b"- a\n- b\n", "c.yaml:1: the file is a list."),
        (b"hello\n", "c.yaml:1: the file is a single text."),
        (b"a: 1\nb: caf\xe9\n", "c.yaml:2: this is not UTF-8 text."),
        ("a: 1\n".encode("utf-16"), "c.yaml:1: this is not UTF-8 text."),
    ],
)
def test_a_file_that_is_no_configuration(
    content: bytes, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peftlight.lightning_cli", None)  # such a file is refused before that import
    Path("c.yaml").write_bytes(content)
    assert expected in _told(["fit", "--config", "c.yaml"], capsys)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", ["fit needs model and data", "--model: CausalLM, ", "--data: Alpaca, "]),
        ("--model CausalLM", ["CausalLM needs model.base_model and model.strategy.", "--model.strategy: AdaLoRA, "]),
        ("--model CausalLM --model.base_model x", ["--model: CausalLM needs model.strategy."]),
        ("--model model.yaml --data SST2", ["model.yaml:7: LoRA has no 'rnk'"]),
    ],
)
def test_an_error_without_a_config(options: str, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    told = _told(["fit", *options.split()], capsys)
    assert [part for part in expected if part not in told] == []


def test_a_class_in_the_working_folder_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(Path.cwd())])
    Path("my_method.py").write_text("from peftlight.strategies import LoRA\nclass Mine(LoRA):\n    pass\n")
    with pytest.raises(SystemExit):  # which is how the parser ends after printing
        cli.main(["fit", "--config", "lora.yaml", "--model.strategy", "my_method.Mine", "--print_config"])
    assert "class_path: my_method.Mine" in capsys.readouterr().out


def test_an_unknown_error_shows_its_innermost_sentence() -> None:
    from peftlight.config_errors.explain import explain

    error = argparse.ArgumentError(None, "something\n  nobody\n  has seen before")
    assert explain(error, ["fit", "--config", "lora.yaml"]) == "something nobody has seen before"
    error.__cause__ = KeyError("the cause")
    assert explain(error, ["fit", "--config", "lora.yaml"]) == "'the cause'"
    assert explain(error, []) == "'the cause'"


def test_the_names_of_other_frameworks_lead_to_keys_that_exist() -> None:
    from peftlight.config_errors import places

    found = places.Places("fit", [])
    for name, path in places._ELSEWHERE.items():
        assert path[-1] in found.parameters(path[:-1]), name


def _printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--print_config"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_a_number_with_an_exponent_is_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text(BASE.replace("2e-3", "1e-4"))
    assert yaml.safe_load(_printed(["fit", "--config", "c.yaml"], capsys))["optimizer"]["init_args"]["lr"] == 1e-4


def test_another_class_on_the_command_line_drops_the_parameters_of_the_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed = yaml.safe_load(_printed(["fit", "--config", "lora.yaml", "--model.strategy", "BitFit"], capsys))
    strategy = printed["model"]["init_args"]["strategy"]
    assert strategy["class_path"] == "peftlight.strategies.BitFit"
    assert "rank" not in strategy.get("init_args", {})


def test_callbacks_that_were_taken_away_are_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    away = ["--trainer.callbacks", "null", "--trainer.callbacks", "LearningRateMonitor"]
    printed = _printed(["fit", "--config", "lora.yaml", *away], capsys)
    assert "LearningRateMonitor" in printed
    assert "ShowPredictions" not in printed


def test_what_print_config_prints_is_a_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    printed = _printed(["fit", "--config", "lora.yaml"], capsys)
    Path("printed.yaml").write_text(printed)
    assert _printed(["fit", "--config", "printed.yaml"], capsys) == printed


def test_a_misspelt_field_in_a_stack_names_a_command_that_helps(capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(BASE)
    members = [{"class_path": "IA3", "init_args": {"layrs": "last 1"}}, {"class_path": "LoRA"}]
    config["model"]["init_args"]["strategy"] = {"class_path": "Stack", "init_args": {"strategies": members}}
    Path("c.yaml").write_text(yaml.safe_dump(config))
    told = _told(["fit", "--config", "c.yaml"], capsys)
    assert "IA3 has no 'layrs'. Did you mean 'layers'?" in told
    assert told.endswith("All of it: peftlight fit --model.strategy.help IA3")


def test_memory_that_ends_is_answered_with_what_would_take_less() -> None:
    from torch import OutOfMemoryError

    from peftlight.config_errors.of_the_run import explained

    told = explained(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."), ["fit"])
    assert told is not None
    for part in ("CUDA has no memory left", "--data.batch_size", "--trainer.accumulate_grad_batches", "Quantize"):
        assert part in str(told)
    assert explained(RuntimeError("another"), ["fit"]) is None


def test_a_key_that_holds_nothing_is_refused_where_no_class_has_it() -> None:
    dropped = "{class_path: LoRA, init_args: {rank_pattern: {}, rnk: {}}}"
    config = {"model": {"init_args": {"strategy": {"class_path": "BitFit", "init_args": {"biases": "all"}}}}}
    with pytest.raises(UserError, match=r"LoRA has no 'rnk'\. Did you mean 'rank'"):
        refuse_dropped(["fit", "--model.strategy", dropped, "--model.strategy", "BitFit"], config)
    kept = dropped.replace(", rnk: {}", "")  # it was LoRA's, and went with it
    refuse_dropped(["fit", "--model.strategy", kept, "--model.strategy", "BitFit"], config)
    own = {"trainer": {"callbacks": [{"class_path": "mine.Own", "init_args": {"of_its_own": {}}}]}}
    refuse_dropped(["fit", "--trainer.callbacks+=[{class_path: mine.Own, init_args: {of_its_own: {}}}]"], own)
