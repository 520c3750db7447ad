"""Bad adapters: missing and damaged files, other bases, tensors that do not fit, patterns that would not end."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from bad_inputs.row import Row, row

_ADAPTER = Path("trained/adapter")
_CONFIG = _ADAPTER / "adapter_config.json"
_RECORD = _ADAPTER / "peftlight.json"
_TENSORS = _ADAPTER / "adapter_model.safetensors"
_A = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"


def _damaged(name: str, make: Callable[[], object], *says: str, command: str = "evaluate trained") -> Row:
    return row(name, command, *says, make=make)


def _json(file: Path, **changes: object) -> Callable[[], object]:
    """The fields changed; those that become ... are gone."""

    def change() -> None:
        values = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def _config(**changes: object) -> Callable[[], object]:
    return _json(_CONFIG, **changes)


def _tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[], object]:
    """The tensors changed, and the record with their checksum gone, as an attacker would do it."""

    def change() -> None:
        values = load_file(_TENSORS)
        edit(values)
        save_file(values, _TENSORS)
        _RECORD.unlink()

    return change


def _tensor(value: torch.Tensor) -> Callable[[], object]:
    return _tensors(lambda tensors: tensors.update({_A: value}))


def _flipped() -> None:
    data = bytearray(_TENSORS.read_bytes())
    data[-5] ^= 1
    _TENSORS.write_bytes(data)


def _pickled() -> None:
    torch.save(load_file(_TENSORS), _ADAPTER / "adapter_model.bin")
    _TENSORS.unlink()


class RunsCode:
    """What a pickle of it does when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("it_ran",)


def _evil_pickle() -> None:
    torch.save({_A: RunsCode()}, _ADAPTER / "adapter_model.bin")
    _TENSORS.unlink()
    _RECORD.unlink()


def _other_values() -> None:
    values = load_file("encoder/model.safetensors")
    values["encoder.layer.0.attention.self.query.weight"] += 1.0
    save_file(values, "encoder/model.safetensors", metadata={"format": "pt"})


def _of_another_base() -> None:
    shutil.copytree(_ADAPTER, "other")
    _json(Path("other/peftlight.json"), base={"name": "./decoder"})()


def _evil_run() -> None:
    """The configuration of a run that came with an adapter, and names a class of the folder."""
    file = Path("trained/config.yaml")
    text = file.read_text()
    file.write_text(text.replace("peftlight.data.TextClassification", "evil.Data"))
    Path("evil.py").write_text("open('it_ran', 'w')\n")


NAMES = [
    row("no such folder", "evaluate ./trainde", "trainde: There is no such folder", "'trained'"),
    row("a misspelt folder in one that is there", "evaluate trained/adaptr", "no such folder", "'adapter'"),
    row("a name of the hub without a network", "evaluate somebody/adapter", "no folder somebody/adapter", "the hub"),
    row("a file for an adapter", "evaluate reviews.csv", "reviews.csv: It is a file"),
    row("a checkpoint for an adapter", "evaluate trained/checkpoints/last.ckpt", "It is a file", "a folder"),
    row("a base for an adapter", "evaluate encoder", "no adapter_config.json", "model.safetensors"),
    row("two adapters of one name", "evaluate trained trained", "'trained'", "NAME=trained"),
    row("adapters of two bases", "evaluate trained other", "./encoder", "./decoder", make=_of_another_base),
    row("a start from what is no adapter", "fit --config run.yaml --init_adapter encoder", "no adapter_config.json"),
]

FILES = [
    _damaged("no configuration", _CONFIG.unlink, "no adapter_config.json"),
    _damaged("no tensors", _TENSORS.unlink, "no adapter_model.safetensors"),
    _damaged(
        "a configuration that is no JSON", lambda: _CONFIG.write_text("{'r': 4}"), "adapter_config.json is not JSON"
    ),
    _damaged("a configuration that is a list", lambda: _CONFIG.write_text("[]"), "a list; expected a JSON object"),
    _damaged(
        "a configuration without end", lambda: _CONFIG.write_text('{"a":' * 5000), "adapter_config.json is not JSON"
    ),
    _damaged("tensors that are cut off", lambda: _TENSORS.write_bytes(_TENSORS.read_bytes()[:-100]), "checksum"),
    _damaged("tensors with one bit turned", _flipped, "adapter_model.safetensors is not the file", "checksum"),
    _damaged("tensors in a pickle", _pickled, "a pickle, which may run code", "--convert_pickle true"),
    _damaged(
        "a pickle that would run code",
        _evil_pickle,
        "adapter_model.bin",
        "posix.mkdir",
        "reading it would run",
        command="evaluate trained --convert_pickle true",
    ),
    _damaged("a record without a checksum", _json(_RECORD, sha256=...), "peftlight.json has no sha256", "Delete it"),
    _damaged("an empty record", lambda: _RECORD.write_text(""), "peftlight.json is not JSON"),
    _damaged("a run that names a class of its own", _evil_run, "config.yaml names the class evil.Data", "--config"),
]

CONTENTS = [
    _damaged("tensors that are not finite", _tensor(torch.full((4, 32), float("nan"))), "not finite", _A),
    _damaged("a tensor missing", _tensors(lambda t: t.pop(_A)), "missing: lora_A of bert.encoder.layer.0"),
    _damaged("a tensor too many", _tensors(lambda t: t.update({"x.y": torch.ones(2)})), "unexpected: x.y"),
    _damaged("a tensor of another shape", _tensor(torch.ones(4, 31)), "(4, 31)", "need (4, 32)"),
    _damaged("a tensor of another kind", _tensor(torch.ones(4, 32, dtype=torch.int64)), "another kind", "int64"),
    _damaged("no such method", _config(peft_type="LORAX"), "peft_type is 'LORAX'", "LORA"),
    _damaged("an option that is not known", _config(of_tomorrow=True), "of_tomorrow=True", "not supported"),
    _damaged("a rank that is text", _config(r="4"), "r is '4'", "a whole number"),
    _damaged("a rank that would fill the memory", _config(r=10**9), "need (1000000000, 32)"),
    _damaged("a pattern that is none", _config(target_modules="(query"), "'(query'", "not a regular expression"),
    _damaged("a pattern without end", _config(target_modules="(a+)+$"), "'(a+)+$'", "take for ever"),
]

_MINE = {"peft_type": "PEFTLIGHT_MINE", "trained": [], "strategy": {"class_path": "my_method.Mine", "init_args": {}}}
OWN_CLASSES = [
    row(
        "a strategy of your own",
        "inspect trained",
        "The strategy my_method.Mine is not known",
        "peftlight inspect trained --import my_method.py",
        make=_config(**_MINE),
        files={"my_method.py": "open('it_ran', 'w')"},
    ),
    row("no such file of classes", "inspect trained --import my_metod.py", "no such file", "'my_method.py'",
        files={"my_method.py": "open('it_ran', 'w')"}),
    row("a file of classes that is no Python", "inspect trained --import my_method.py", "my_method.py:1: '(' was never",
        files={"my_method.py": "def half("}),
]  # fmt: skip

BASES = [
    _damaged("a base that was changed since", _other_values, "trained on another base", "--other_base true"),
    row("a base of another kind", "evaluate trained --base ./decoder", "no LORA tensor that fits"),
    _damaged("a base that is gone", lambda: shutil.rmtree("encoder"), "no model at ./encoder"),
    row("an adapter that does not write", "generate trained --prompt Once", "writes no text", "peftlight predict"),
    row("no such rows", "evaluate trained --source review.csv", "no file review.csv", "'reviews.csv'"),
    row("two heads in one", "combine trained other=trained:-1 both", "each train a head", "heads_from"),
    row("a folder in the way", "merge trained encoder", "encoder is not empty", "Choose another folder."),
]
ROWS = [*NAMES, *FILES, *CONTENTS, *OWN_CLASSES, *BASES]
