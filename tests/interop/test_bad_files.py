"""What is wrong with an adapter's files is said, and the model is as it was."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import BitFit, BottleneckAdapter, Full, LoRA
from strategies.against_peft import output

CONFIG, TENSORS, ORIGIN = "adapter_config.json", "adapter_model.safetensors", "peftlight.json"
QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"

Damage = Callable[[Path], Any]


def config(**changes: Any) -> Damage:
    def change(folder: Path) -> None:
        values = {**json.loads((folder / CONFIG).read_text()), **changes}
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def change(folder: Path) -> None:
        values = load_file(folder / TENSORS)
        edit(values)
        save_file(values, folder / TENSORS)
        (folder / ORIGIN).unlink()

    return change


def moved(old: str, new: str) -> Damage:
    return tensors(lambda t: t.update({new: t.pop(old)}))


def text(file: str, content: str) -> Damage:
    return lambda folder: (folder / file).write_text(content)


def removed(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def pickled(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model.bin")


def flipped(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-3] ^= 4
    (folder / TENSORS).write_bytes(bytes(content))


def truncated(folder: Path) -> None:
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])
    (folder / ORIGIN).unlink()


def garbage(folder: Path) -> None:
    (folder / TENSORS).write_bytes(b"not a model" * 50)
    (folder / ORIGIN).unlink()


def not_finite(values: dict[str, torch.Tensor]) -> None:
    values[f"{QUERY}.lora_A.weight"][0, 0] = float("nan")


def norms(width: int) -> Damage:
    """A DoRA whose norms have this shape."""
    sites = [
        f"base_model.model.bert.encoder.layer.{n}.attention.self.{name}" for n in (0, 1) for name in ("query", "value")
    ]

    def change(folder: Path) -> None:
        config(use_dora=True)(folder)
        tensors(lambda t: t.update({f"{site}.lora_magnitude_vector": torch.ones(width) for site in sites}))(folder)

    return change


LORA: dict[str, tuple[Damage, list[str]]] = {
    "config missing": (removed(CONFIG), ["It has no adapter_config.json", "adapter_model.safetensors"]),
    "tensors missing": (removed(TENSORS), ["It has no adapter_model.safetensors"]),
    "pickle": (pickled, ["adapter_model.bin", "safe_serialization=True", "safetensors"]),
    "config not JSON": (text(CONFIG, "{'r': 8}"), ["adapter_config.json is not JSON"]),
    "config not an object": (text(CONFIG, "[1]"), ["adapter_config.json holds a list", "expected a JSON object"]),
    "config not text": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe{"), ["adapter_config.json is not JSON"]),
    "type unknown": (config(peft_type="LOHA"), ["peft_type is 'LOHA'", "LORA"]),
    "type absent": (config(peft_type=...), ["peft_type is None"]),
    "type not text": (config(peft_type=["LORA"]), ["peft_type is ['LORA']"]),
    "bit flip": (flipped, ["checksum", "peftlight.json"]),
    "newer format": (text(ORIGIN, '{"format": 99}'), ["format 99"]),
    "origin not JSON": (text(ORIGIN, "?"), ["peftlight.json is not JSON"]),
    "truncated": (truncated, ["damaged or not a safetensors file"]),
    "garbage": (garbage, ["damaged or not a safetensors file"]),
    "empty file": (text(TENSORS, ""), ["checksum"]),
    "not finite": (tensors(not_finite), ["not finite", f"{QUERY}.lora_A.weight"]),
    "a missing matrix": (
        tensors(lambda t: t.pop(f"{QUERY}.lora_B.weight")),
        ["missing: lora_B of bert.encoder.layer.0.attention.self.query"],
    ),
    "a missing site": (
        tensors(lambda t: [t.pop(key) for key in list(t) if key.startswith(QUERY)]),
        ["missing: lora_A and lora_B of bert.encoder.layer.0.attention.self.query, which target_modules selects"],
    ),
    "a missing head": (
        tensors(lambda t: [t.pop(key) for key in list(t) if "classifier" in key]),
        ["missing: classifier.bias", "missing: classifier.weight"],
    ),
    "half a head": (tensors(lambda t: t.pop("base_model.model.classifier.bias")), ["missing: classifier.bias"]),
    "an unexpected site": (
        moved(f"{QUERY}.lora_A.weight", f"{QUERY.replace('layer.0', 'layer.9')}.lora_A.weight"),
        ["unexpected: ", "layer.9.attention.self.query.lora_A.weight", "missing: lora_A of"],
    ),
    "an unexpected kind of tensor": (
        tensors(lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(32)})),
        [f"unexpected: {QUERY}.lora_magnitude_vector"],
    ),
    "a site of the wrong kind": (
        tensors(
            lambda t: t.update(
                {f"base_model.model.bert.pooler.activation.lora_{m}.weight": torch.ones(4, 4) for m in "AB"}
            )
        ),
        ["bert.pooler.activation is of the class Tanh, which this method cannot change"],
    ),
    "the wrong shape": (
        tensors(lambda t: t.update({f"{QUERY}.lora_B.weight": torch.ones(31, 4)})),
        ["lora_B of bert.encoder.layer.0.attention.self.query has shape (31, 4)", "need (32, 4)"],
    ),
    "another rank than the config's": (config(r=6), ["has shape (4, 32)", "the config need (6, 32)"]),
    "another number of labels": (
        tensors(lambda t: t.update({"base_model.model.classifier.bias": torch.ones(7)})),
        ["classifier.bias has shape (7,); in the model (3,)"],
    ),
    "no adapter at all": (
        tensors(lambda t: [t.pop(key) for key in list(t) if "lora" in key]),
        ["It holds no LORA tensor that fits this BertForSequenceClassification"],
    ),
    "an adapter of another model": (
        tensors(lambda t: [t.update({k.replace("bert", "gpt"): t.pop(k)}) for k in list(t)]),
        ["It holds no LORA tensor that fits", "gpt.encoder"],
    ),
    "a changed base": (
        tensors(lambda t: t.update({"base_model.model.bert.pooler.dense.bias": torch.ones(32)})),
        ["bert.pooler.dense.bias differs from the base"],
    ),
    "a changed embedding": (
        tensors(lambda t: t.update({"base_model.model.bert.embeddings.word_embeddings.weight": torch.ones(105, 32)})),
        ["word_embeddings.weight has shape (105, 32); in the model (100, 32)"],
    ),
    "a head that the model has not": (config(modules_to_save=["scorer"]), ["modules_to_save lists scorer"]),
    "DoRA without norms": (
        config(use_dora=True),
        ["missing: lora_magnitude_vector of bert.encoder.layer.0.attention.self.query"],
    ),
    "norms of the wrong shape": (norms(31), ["lora_magnitude_vector of bert.encoder.layer", "(31,)", "need (32,)"]),
    "DoRA that starts from the weight": (
        config(use_dora=True, init_lora_weights="pissa"),
        ["use_dora takes init_lora_weights default or gaussian, not pissa"],
    ),
    "r is text": (config(r="8"), ["r is '8'"]),
    "r is zero": (config(r=0), ["rank of at least 1"]),
    "alpha is true": (config(lora_alpha=True), ["lora_alpha is True"]),
    "dropout is 1": (config(lora_dropout=1.0), ["dropout is a share"]),
    "bias is unknown": (config(bias="some"), ["bias is 'some'"]),
    "targets are numbers": (config(target_modules=[1]), ["target_modules is [1]"]),
    "targets are no regex": (config(target_modules="(query"), ["'(query', which is not a regular expression"]),
    "patterns are a list": (config(rank_pattern=["query"]), ["rank_pattern is ['query']"]),
    "layers are text": (config(layers_to_transform="all"), ["layers_to_transform is 'all'"]),
    "another task": (config(task_type=7), ["task_type is 7"]),
}
LORA |= {
    f"option {option}": (config(**{option: value}), [option, str(value)])
    for option, value in {
        "use_dora": "yes",
        "use_rslora": 1,
        "lora_bias": True,
        "use_qalora": True,
        "target_parameters": ["experts.down_proj"],
        "trainable_token_indices": [1, 2],
        "kasa_config": {"beta": 1},
        "alora_invocation_tokens": [3],
        "layer_replication": [[0, 1]],
        "loftq_config": {"bits": 4},
        "ensure_weight_tying": True,
        "an_option_of_the_future": 3,
        "init_lora_weights": "lora_ga",
    }.items()
}
LORA |= {f"start {start}": (config(init_lora_weights=start), [start]) for start in ("pissa_niter_4", "loftq", "corda")}

OWN: dict[str, tuple[Damage, list[str]]] = {
    "strategy missing": (config(strategy=...), ["'strategy' is None"]),
    "strategy unknown": (
        config(strategy={"class_path": "os.system", "init_args": {}}),
        ["The strategy os.system is not known"],
    ),
    "strategy with other fields": (
        config(strategy={"class_path": "peftlight.strategies.bottleneck.BottleneckAdapter", "init_args": {"r": 1}}),
        ["does not take what was saved"],
    ),
    "another type": (config(peft_type="PEFTLIGHT_FULL"), ["PEFTLIGHT_FULL", "BottleneckAdapter"]),
    "trained is text": (config(trained="all"), ["'trained' is 'all'"]),
    "missing": (tensors(lambda t: t.pop("classifier.bias")), ["missing from adapter_model", "classifier.bias"]),
    "unexpected": (tensors(lambda t: t.update({"x.bias": torch.ones(1)})), ["not part of the model", "x.bias"]),
    "shape": (tensors(lambda t: t.update({"classifier.bias": torch.ones(5)})), ["classifier.bias has shape (5,)"]),
    "bit flip": (flipped, ["checksum"]),
}
CASES = (
    [(LoRA, name) for name in LORA]
    + [(BottleneckAdapter, name) for name in OWN]
    + [(Full, name) for name in ("bit flip", "shape")]
)


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return make("bert")


@pytest.mark.parametrize(("kind", "case"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_bad_files_are_refused(base: nn.Module, kind: type[Any], case: str, tmp_path: Path) -> None:
    adapter = attach(make("bert"), LoRA(rank=4) if kind is LoRA else kind(), modules_to_train=["classifier"])
    stirred(adapter.model)
    save_adapter(adapter, tmp_path)
    damage, parts = (LORA if kind is LoRA else OWN)[case]
    damage(tmp_path)
    assert_refused(base, tmp_path, parts)


def stirred(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)


def assert_refused(model: nn.Module, folder: Path, parts: list[str]) -> None:
    model.requires_grad_(True)
    model.classifier.weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(UserError) as raised:
        load_adapter(model, folder)
    assert str(raised.value).startswith(f"Cannot load the adapter in {folder}: ")
    assert not [part for part in parts if part not in str(raised.value)], str(raised.value)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) and value.dtype == after[key].dtype for key, value in before.items())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_every_problem_is_listed_at_once(base: nn.Module, tmp_path: Path) -> None:
    save_adapter(attach(make("bert"), LoRA(rank=4), modules_to_train=["classifier"]), tmp_path)

    def edit(values: dict[str, torch.Tensor]) -> None:
        values[f"{QUERY}.lora_A.weight"] = torch.ones(4, 3)
        values["base_model.model.other.weight"] = torch.ones(1)
        del values["base_model.model.classifier.bias"]

    tensors(edit)(tmp_path)
    assert_refused(
        base, tmp_path, ["has shape (4, 3)", "unexpected: base_model.model.other", "missing: classifier.bias"]
    )


def test_no_such_folder(base: nn.Module, tmp_path: Path) -> None:
    assert_refused(base, tmp_path / "nowhere", ["There is no such folder"])


def test_a_name_that_is_taken(tmp_path: Path) -> None:
    model = make("bert")
    adapter = attach(model, LoRA(rank=4))
    save_adapter(adapter, tmp_path)
    before = output(model, inputs_for("bert"))
    with pytest.raises(UserError, match="'default' is already attached"):
        load_adapter(model, tmp_path)
    assert torch.equal(output(model, inputs_for("bert")), before)
    assert set(adapter.parameters()) == {key for key, p in model.named_parameters() if p.requires_grad}


def test_a_half_precision_base_is_left_so(tmp_path: Path) -> None:
    """The head would become float32 just before the tensors are copied."""
    save_adapter(attach(make("bert"), BottleneckAdapter(), modules_to_train=["classifier"]), tmp_path)
    OWN["shape"][0](tmp_path)
    assert_refused(make("bert").bfloat16(), tmp_path, ["classifier.bias has shape (5,)"])


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    adapter = attach(make("bert"), LoRA(rank=4))
    save_adapter(adapter, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    next(iter(adapter.parameters().values())).data[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"is not saved: 1 of its tensors .* not finite .*query.lora_A.weight"):
        save_adapter(adapter, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_removed_adapter_is_not_saved(tmp_path: Path) -> None:
    for strategy in (LoRA(rank=4), BitFit()):
        adapter = attach(make("bert"), strategy, modules_to_train=["classifier"])
        adapter.remove()
        with pytest.raises(UserError, match="nothing to save"):
            save_adapter(adapter, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_peft_cannot_say_is_saved_in_our_own_format_with_a_warning(tmp_path: Path) -> None:
    """To HF PEFT the head's name means every module that ends with it, be it in the middle of a word."""

    def two_layers() -> nn.Module:
        return nn.ModuleDict({"pre_head": nn.Linear(4, 4), "head": nn.Linear(4, 4)})

    adapter = attach(two_layers(), LoRA(rank=2, target_modules=["pre_head"]), modules_to_train=["head"])
    for parameter in adapter.parameters().values():
        parameter.data.normal_()
    with pytest.warns(UserWarning, match=r"pre_head.* peftlight's own format"):
        save_adapter(adapter, tmp_path)
    loaded = load_adapter(two_layers(), tmp_path, other_base=True)
    assert all(torch.equal(value, adapter.state()[key]) for key, value in loaded.state().items())


def test_fields_that_json_cannot_hold(tmp_path: Path) -> None:
    adapter = attach(make("bert"), BitFit())
    adapter.strategy = _WithSet()
    with pytest.raises(UserError, match=r"_WithSet.kinds is .* which a file cannot hold"):
        save_adapter(adapter, tmp_path)
    assert list(tmp_path.iterdir()) == []


@dataclass
class _WithSet(BitFit):
    kinds: set[str] = field(default_factory=lambda: {"bias"})


_FULL_DISK = """
import resource, sys
from pathlib import Path
from models import make
from torch import nn
from peftlight import attach, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import LoRA

folder, which = Path(sys.argv[1]), sys.argv[2]
save_adapter(attach(make("bert"), LoRA(rank=4)), folder)
before = {path.name: path.read_bytes() for path in folder.iterdir()}
if which == "large":
    other = attach(make("bert"), LoRA(rank=32, target_modules="all-linear"))
else:
    other = attach(nn.Sequential(nn.Linear(4, 4)), LoRA(rank=1, target_modules=["0"]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if which == "large" else 350, resource.RLIM_INFINITY))
try:
    save_adapter(other, folder)
except UserError as error:
    print(error)
assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
"""


@pytest.mark.parametrize(("which", "file"), [("large", TENSORS), ("small", CONFIG)])
def test_a_full_disk_leaves_the_earlier_adapter(which: str, file: str, tmp_path: Path) -> None:
    """The tensors do not fit; or they do, and the config does not."""
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{tests}:{tests.parent / 'src'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", _FULL_DISK, str(tmp_path), which]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert f"No room left to write {tmp_path / file}" in done.stdout
    assert "unchanged" in done.stdout
    load_adapter(make("bert"), tmp_path)
