"""What the tests of the exchange with HF PEFT share: both directions on a tiny model, for any method."""

import copy
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import Adapter, PEFTStrategy, attach, load_adapter, save_adapter
from strategies.against_peft import assert_near, output

HEADS = {"bert": ("classifier",), "roberta": ("classifier",), "vit": ("classifier",), "llama_classifier": ("score",)}
TASKS = {
    "bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama_classifier": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
}  # fmt: skip
FILES = ("adapter_model.safetensors", "adapter_config.json")


def heads(name: str) -> list[str]:
    """The heads of the tiny model; a list of its own, for HF PEFT adds to it."""
    return [*HEADS.get(name, ())]


def computed(model: nn.Module, inputs: Any) -> Tensor:
    with torch.no_grad():
        return output(model, inputs)


def stir(parameters: Iterable[nn.Parameter]) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.05 * torch.randn_like(parameter))


def quietly(model: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """HF PEFT's model from the folder; a missing or unexpected key would only be a warning there."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        theirs = PeftModel.from_pretrained(model, folder, **options)
    complaints = [str(w.message) for w in seen if "missing" in str(w.message) or "unexpected" in str(w.message).lower()]
    assert not complaints
    return theirs


def saved(name: str, strategy: PEFTStrategy, folder: Path, trained: list[str]) -> tuple[nn.Module, Adapter]:
    """The untouched base, and the stirred adapter that was saved."""
    base = make(name)
    adapter = attach(copy.deepcopy(base), strategy, modules_to_train=trained)
    stir(adapter.parameters().values())
    save_adapter(adapter, folder)
    return base, adapter


def ours_is_read_by_both(name: str, strategy: PEFTStrategy, folder: Path, kind: str) -> Adapter:
    """What we write as `kind` HF PEFT computes with equally, we read it bit for bit, and write the same bytes again."""
    base, adapter = saved(name, strategy, folder, heads(name))
    assert config_in(folder)["peft_type"] == kind
    expected = computed(adapter.model, inputs_for(name))
    assert float((expected - computed(base, inputs_for(name))).abs().max()) > 1e-4
    again = load_adapter(copy.deepcopy(base), folder, "other")
    assert torch.equal(computed(again.model, inputs_for(name)), expected)
    assert type(again.strategy) is type(strategy)
    ours = {key.replace(".other.", ".default."): tuple(p.shape) for key, p in again.parameters().items()}
    assert ours == {key: tuple(p.shape) for key, p in adapter.parameters().items()}
    assert_near(computed(quietly(base, folder), inputs_for(name)), expected)
    save_adapter(again, folder / "again")
    for file in FILES:
        assert (folder / "again" / file).read_bytes() == (folder / file).read_bytes()
    return again


def theirs_is_read_by_us(name: str, config: PeftConfig, folder: Path) -> Adapter:
    """HF PEFT's adapter, stirred and saved, gives its numbers with us; taken off, it leaves the base as it was."""
    base = make(name)
    theirs = get_peft_model(copy.deepcopy(base), config).eval()
    trained = [p for key, p in theirs.named_parameters() if p.requires_grad and "original_module" not in key]
    stir(trained)
    theirs.save_pretrained(folder)
    before, expected = computed(base, inputs_for(name)), computed(theirs, inputs_for(name))
    assert float((expected - before).abs().max()) > 1e-4
    adapter = load_adapter(base, folder)
    assert_near(computed(base, inputs_for(name)), expected)
    assert sum(p.numel() for p in adapter.parameters().values()) == sum(p.numel() for p in trained)
    again = make(name)
    save_adapter(adapter, folder / "again")
    load_adapter(again, folder / "again")
    assert torch.equal(computed(again, inputs_for(name)), computed(base, inputs_for(name)))
    adapter.remove()
    assert torch.equal(computed(base, inputs_for(name)), before)
    return adapter


def config_in(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return config


def changed(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor | None]) -> None:
    """Exchange some fields and tensors of the files in `folder`; fields `...` and tensors None are left out."""
    (folder / "peftlight.json").unlink(missing_ok=True)
    fields = {field: value for field, value in {**config_in(folder), **config}.items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    path = folder / "adapter_model.safetensors"
    save_file({key: value for key, value in {**load_file(path), **tensors}.items() if value is not None}, path)
