"""What is recorded of an adapter: its base and its training, read back with types, and the same bytes each time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import inputs_for, make
from peftlight import PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.interop import Record, read_record
from peftlight.interop.base_hash import differs, fingerprint
from peftlight.strategies import AdaLoRA, BitFit, Full, LayerNormTuning, LoRA, PromptTuning
from strategies.against_peft import output

ORIGIN = "peftlight.json"
GIVEN: dict[str, Any] = {
    "base": {"name": "pypi:tiny-bert", "revision": "v2", "auto_class": "AutoModel", "trust_remote_code": False},
    "task": "SequenceClassification",
    "label_names": ["cold", "mild", "hot"],
    "data": {"source": "weather.csv", "fingerprint": "abc"},
    "metrics": {"val_accuracy": 0.75, "val_loss": None},
    "steps": 12,
    "seed": 7,
    "note": "ours",
}


def saved(folder: Path, strategy: PEFTStrategy | None = None, record: Any = None, base: str = "bert") -> nn.Module:
    """The model of the adapter that was saved; its head is trained."""
    adapter = attach(make(base), strategy or LoRA(rank=4), modules_to_train=["classifier"])
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.1)
    save_adapter(adapter, folder, record)
    return adapter.model


def edited(folder: Path, **changes: Any) -> None:
    content = {**json.loads((folder / ORIGIN).read_text()), **changes}
    (folder / ORIGIN).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def test_a_record_is_read_as_it_was_given(tmp_path: Path) -> None:
    saved(tmp_path, record=GIVEN)
    found = read_record(tmp_path)
    assert (found.base.name, found.base.revision, found.base.auto_class) == ("pypi:tiny-bert", "v2", "AutoModel")
    assert (found.base.trust_remote_code, found.base.dtype) == (False, "float32")
    assert (found.task, found.label_names, found.data) == (GIVEN["task"], GIVEN["label_names"], GIVEN["data"])
    assert (found.metrics, found.steps, found.seed) == (GIVEN["metrics"], 12, 7)
    assert found.strategy is not None
    assert found.strategy["init_args"]["rank"] == 4
    assert found.trained == ["classifier"]
    assert found.versions is not None
    assert found.versions["torch"] == torch.__version__
    assert json.loads((tmp_path / ORIGIN).read_text())["note"] == "ours"


def test_the_same_record_gives_the_same_bytes(tmp_path: Path) -> None:
    saved(tmp_path / "one", record=GIVEN)
    saved(tmp_path / "two", record=dict(reversed(GIVEN.items())))
    for file in ("adapter_config.json", "adapter_model.safetensors", ORIGIN):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_caller_cannot_write_over_what_is_ours(tmp_path: Path) -> None:
    saved(tmp_path, record={"sha256": "0", "format": 0, "base": {"weights": "0", "dtype": "int3"}})
    assert read_record(tmp_path).base.dtype == "float32"
    load_adapter(make("bert"), tmp_path)


def test_without_a_name_the_base_is_called_as_its_config_says(tmp_path: Path) -> None:
    model = make("bert")
    model.config.name_or_path = "somewhere/bert"
    save_adapter(attach(model, LoRA(rank=4)), tmp_path)
    assert read_record(tmp_path).base.name == "somewhere/bert"


def test_a_record_that_json_cannot_hold(tmp_path: Path) -> None:
    for value in (float("nan"), {1, 2}):
        with pytest.raises(UserError, match="record's fields cannot be saved"):
            saved(tmp_path, record={"data": {"note": value}})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("record", [{"steps": "many"}, {"base": "org/bert"}, {"base": {"name": 3}}])
def test_a_record_that_could_not_be_read_again(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"peftlight\.json: .* is .*; expected"):
        saved(tmp_path, record=record)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_program_has_the_record_of_its_config(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / ORIGIN).unlink()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/bert"}))
    found = read_record(tmp_path)
    assert found.base.name == "org/bert"
    assert found == Record(base=found.base)


def test_files_of_the_first_format_are_read(tmp_path: Path) -> None:
    model = saved(tmp_path)
    edited(tmp_path, format=1, base=..., base_model="org/bert")
    assert read_record(tmp_path).base.name == "org/bert"
    again = load_adapter(make("bert"), tmp_path).model
    assert torch.equal(output(again, inputs_for("bert")), output(model, inputs_for("bert")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "format 3; this version of peftlight knows 1 to 2"),
        ({"format": True}, "format True"),
        ({"format": ...}, "format None"),
        ({"base": []}, r"base is \[\]"),
        ({"base": {"revision": 3}}, r"base\.revision is 3; expected str | None"),
        ({"label_names": "cold"}, "label_names is 'cold'"),
        ({"label_names": [1]}, r"label_names is \[1\]"),
        ({"metrics": {"loss": "low"}}, "metrics is"),
        ({"steps": 1.5}, r"steps is 1\.5"),
        ({"seed": False}, "seed is False"),
        ({"sha256": ...}, "no sha256"),
    ],
)
def test_other_kinds_of_values_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, record=GIVEN)
    edited(tmp_path, **changes)
    for read in (read_record, lambda folder: load_adapter(make("bert"), folder)):
        with pytest.raises(UserError, match=message):
            read(tmp_path)


STRATEGIES: dict[str, Callable[[], PEFTStrategy]] = {
    "lora": lambda: LoRA(rank=4),
    "biases": lambda: LoRA(rank=4, bias="all"),
    "adalora": lambda: AdaLoRA(init_r=6, target_r=4),
    "bitfit": BitFit,
    "layer norm": LayerNormTuning,
    "prompt": lambda: PromptTuning(num_virtual_tokens=3),
}


@pytest.mark.parametrize("method", STRATEGIES)
def test_another_base_is_refused(method: str, tmp_path: Path) -> None:
    """One value of one frozen weight is enough in a small model."""
    saved(tmp_path, STRATEGIES[method](), {"base": {"name": "org/first", "revision": "main"}})
    load_adapter(make("bert"), tmp_path)
    other = make("bert")
    other.config.name_or_path = "org/second"
    other.get_parameter("bert.pooler.dense.weight").data[3, 4] += 1e-6
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UserError, match=r"another base, org/first \(main\).* is org/second.*values.*other_base=True"):
        load_adapter(other, tmp_path)
    now = other.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    load_adapter(other, tmp_path, other_base=True)


def test_a_new_head_does_not_make_another_base(tmp_path: Path) -> None:
    """It is random each time, and comes with the adapter."""
    saved(tmp_path)
    other = make("bert")
    nn.init.normal_(other.get_parameter("classifier.weight"))
    load_adapter(other, tmp_path)


def test_in_another_precision_names_and_shapes_alone_are_compared(tmp_path: Path) -> None:
    saved(tmp_path)
    load_adapter(make("bert").bfloat16(), tmp_path)
    edited(tmp_path, base={**json.loads((tmp_path / ORIGIN).read_text())["base"], "shapes": "0"})
    with pytest.raises(UserError, match="names or shapes"):
        load_adapter(make("bert").bfloat16(), tmp_path)


def test_what_a_training_puts_into_float32_is_still_the_same_base(tmp_path: Path) -> None:
    adapter = attach(make("bert").bfloat16(), BitFit())
    adapter.train_in_float32()
    assert adapter.model.get_parameter("bert.embeddings.LayerNorm.weight").dtype == torch.float32
    save_adapter(adapter, tmp_path)
    assert read_record(tmp_path).base.dtype == "bfloat16"
    load_adapter(make("bert").bfloat16(), tmp_path)


def test_other_adapters_on_the_model_and_a_merge_leave_the_base_what_it_is(tmp_path: Path) -> None:
    model = make("bert")
    attach(model, LoRA(rank=2), "other")
    adapter = attach(model, LoRA(rank=4))
    save_adapter(adapter, tmp_path / "beside")
    assert read_record(tmp_path / "beside").base == read_record_of(LoRA(rank=4), tmp_path / "alone")
    merged = attach(make("bert"), LoRA(rank=4))
    torch.nn.init.normal_(next(iter(merged.sites.values())).get_parameter("B"))
    merged.merge()
    save_adapter(merged, tmp_path / "merged")
    assert read_record(tmp_path / "merged").base == read_record(tmp_path / "alone").base


def read_record_of(strategy: PEFTStrategy, folder: Path) -> Any:
    save_adapter(attach(make("bert"), strategy), folder)
    return read_record(folder).base


def test_where_nothing_is_frozen_there_is_nothing_to_compare(tmp_path: Path) -> None:
    saved(tmp_path, Full())
    base = read_record(tmp_path).base
    assert (base.weights, base.shapes) == (None, None)
    load_adapter(make("bert", seed=3), tmp_path)


def test_a_large_tensor_is_read_at_even_distances(tmp_path: Path) -> None:
    """Every third of 196,608 values counts."""
    model = nn.Sequential(nn.Linear(512, 384, bias=False), nn.Linear(384, 4))
    save_adapter(attach(model, LoRA(rank=2, target_modules=["1"])), tmp_path)
    fresh = nn.Sequential(nn.Linear(512, 384, bias=False), nn.Linear(384, 4))
    fresh.load_state_dict({key: value for key, value in model.state_dict().items() if "deltas" not in key})
    values = fresh.get_parameter("0.weight").data.view(-1)
    values[1] += 1
    load_adapter(fresh, tmp_path, "between")
    values[3] += 1
    with pytest.raises(UserError, match="differ in the values"):
        load_adapter(fresh, tmp_path, "counted")
    assert len(values) == 3 << 16


class Packed(nn.Linear):
    """Holds two numbers of four bits in each byte."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features)
        packed = torch.zeros(like.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def test_a_quantized_base_is_compared_by_names_and_shapes() -> None:
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    packed = nn.Sequential(Packed(base[0]), nn.Linear(64, 4))  # type: ignore[arg-type]
    there, here = (fingerprint(attach(model, LoRA(rank=2, target_modules=["1"]))) for model in (base, packed))
    assert (there.dtype, here.dtype) == ("float32", "uint8")
    assert there.shapes == here.shapes
    assert differs(there, here) is None
    again = nn.Sequential(Packed(base[0]), nn.Linear(64, 4))  # type: ignore[arg-type]
    nn.init.ones_(again[0].weight)  # type: ignore[arg-type]
    assert differs(here, fingerprint(attach(again, LoRA(rank=2, target_modules=["1"])))) is None
    wider = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 4))
    assert differs(fingerprint(attach(wider, LoRA(rank=2, target_modules=["1"]))), here) == "names or shapes"


def test_a_base_without_values_has_no_hash_of_them() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    found = fingerprint(attach(model, BitFit()))
    assert found.weights is None
    assert found.shapes is not None
