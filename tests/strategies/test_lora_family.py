"""LoRA's relatives equal HF PEFT's, or the papers' equations; they merge, and what the options refuse is said."""

from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig

from models import MODELS, inputs_for, make
from peftlight.strategies import LoRA
from strategies.against_peft import (
    assert_near,
    by_our_names,
    losses,
    output,
    pair,
    parity_of,
    stir,
)
from strategies.test_lora_against_peft import EXTRA, TARGETS, ConvNet, compare

pytestmark = pytest.mark.filterwarnings("ignore")

FAMILY: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "pissa with rslora": {"init_lora_weights": "pissa", "use_rslora": True},
}
"""Options that are called the same in HF PEFT."""
CASES = [(method, name) for method in FAMILY for name in MODELS if (method, name) != ("olora", "gpt2")]
"""HF PEFT's OLoRA makes matrices of the wrong shapes for GPT-2's layers."""


def recipes(name: str, method: str, targets: list[str] | None = None, dropout: float = 0.0) -> tuple[LoRA, LoraConfig]:
    fields, targets = FAMILY[method], targets or TARGETS[name]
    return (
        LoRA(rank=4, alpha=12, dropout=dropout, target_modules=targets, **fields),
        LoraConfig(r=4, lora_alpha=12, lora_dropout=dropout, target_modules=targets, **fields),
    )


def parity_of_method(method: str, architecture: str) -> dict[str, float]:
    """The largest relative errors of a method of the family beside HF PEFT's."""
    return parity_of(architecture, *recipes(architecture, method))


parity_rslora = partial(parity_of_method, "rslora")
parity_dora = partial(parity_of_method, "dora")
parity_pissa = partial(parity_of_method, "pissa")
parity_olora = partial(parity_of_method, "olora")


@pytest.mark.parametrize(("method", "name"), CASES)
def test_it_equals_hf_peft(method: str, name: str) -> None:
    assert all(error <= 1e-5 for error in parity_of_method(method, name).values())


@pytest.mark.parametrize(("method", "name"), CASES)
def test_it_starts_with_the_same_weights_and_changes_nothing(method: str, name: str) -> None:
    model, inputs = make(name), inputs_for(name)
    targets = TARGETS[name] if name == "gpt2" else TARGETS[name] + EXTRA[name]
    with torch.no_grad():
        before = output(model, inputs)
    adapter, theirs = pair(model, *recipes(name, method, targets))
    with torch.no_grad():
        assert torch.equal(output(model, inputs), before)
    named = by_our_names(theirs)
    for key, parameter in adapter.parameters().items():
        assert_near(parameter, named[key], 1e-6, key)
        assert method not in ("gaussian", "rslora") or torch.equal(parameter, named[key])


@pytest.mark.parametrize("method", ["dora", "pissa", "rslora"])
@pytest.mark.parametrize("name", MODELS)
def test_it_trains_the_same_with_dropout(name: str, method: str) -> None:
    """Dropout acts on the update alone, and in DoRA on the part of the base that is rescaled."""
    adapter, theirs = pair(make(name), *recipes(name, method, dropout=0.3))
    stir(adapter, theirs)
    ours = losses(adapter.model, list(adapter.parameters().values()), inputs_for(name), steps=8)
    other = losses(theirs, [p for p in theirs.parameters() if p.requires_grad], inputs_for(name), steps=8)
    assert ours == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(("name", "table"), [("bert", "word_embeddings"), ("llama", "embed_tokens"), ("gpt2", "wte")])
def test_dora_on_embeddings(name: str, table: str) -> None:
    adapter, theirs = pair(make(name), *recipes(name, "dora", [table, *TARGETS[name]]))
    assert any(key.endswith(f"{table}.deltas.default.m") for key in adapter.parameters())
    compare(adapter, theirs.eval(), inputs_for(name))


@pytest.mark.parametrize("options", [{}, {"stride": 2}, {"padding": 1}, {"bias": False}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_dora_on_convolutions(options: dict[str, Any], dropout: float) -> None:
    torch.manual_seed(0)
    fields = {"target_modules": ["image", "line"], "use_dora": True}
    strategy, config = (
        LoRA(rank=4, dropout=dropout, **fields),
        LoraConfig(r=4, lora_alpha=16, lora_dropout=dropout, **fields),
    )
    adapter, theirs = pair(ConvNet(**options), strategy, config)
    x = torch.randn(5, 4, 9, 8)
    stir(adapter, theirs)
    torch.manual_seed(4)
    ours = output(adapter.model.train(), x)
    torch.manual_seed(4)
    assert_near(ours, output(theirs.train(), x))
    compare(adapter.model.eval() and adapter, theirs.eval(), x)
