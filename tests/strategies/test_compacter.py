"""Compacter is a bottleneck adapter whose weights are the paper's sums of Kronecker products."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from models import MODELS, inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import Compacter
from peftlight.strategies.compacter import PHMLinear, PHMRule
from strategies.against_peft import losses, output
from strategies.by_equation import Values, beside, installed
from strategies.small import stirred


def kronecker(A: Tensor, s: Tensor, t: Tensor) -> Tensor:
    return sum((torch.kron(a, left.T @ right) for a, left, right in zip(A, s, t, strict=True)), torch.zeros(()))


def equation(values: Values, site: str, h: Tensor) -> Tensor:
    part = {key.rpartition(".bottleneck.")[2]: value for key, value in values.items() if key.startswith(f"{site}.")}
    shared = next(value for key, value in values.items() if key.endswith("down.rule.A"))
    for layer in ("down", "up"):
        weight = kronecker(part.get(f"{layer}.rule.A", shared), part[f"{layer}.s"], part[f"{layer}.t"])
        h = h @ weight.T + part[f"{layer}.bias"]
        h = F.gelu(h, approximate="tanh") if layer == "down" else h
    return h


def parity(architecture: str, variant: str = "houlsby", **fields: Any) -> dict[str, float]:
    strategy = Compacter(variant=variant, width=8, **fields)
    return beside(architecture, strategy, installed(architecture, variant, equation)).errors()


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_equation(name: str) -> None:
    assert max(parity(name).values()) < 1e-5


@pytest.mark.parametrize("variant", ["pfeiffer", "parallel"])
@pytest.mark.parametrize("fields", [{"shared": False}, {"rank": 2}, {"phm_dim": 2, "rank": 3}, {"phm_dim": 1}], ids=str)
def test_options_equal_the_equation(fields: dict[str, Any], variant: str) -> None:
    assert max(parity("bert", variant, **fields).values()) < 1e-5


@pytest.mark.parametrize(("inputs", "outputs", "n", "rank"), [(12, 8, 4, 1), (8, 12, 4, 2), (6, 9, 3, 2), (5, 7, 1, 3)])
def test_the_layer_equals_one_with_the_kronecker_product(inputs: int, outputs: int, n: int, rank: int) -> None:
    torch.manual_seed(0)
    layer = PHMLinear(inputs, outputs, PHMRule(n), rank, mute=False).double()
    torch.nn.init.normal_(layer.rule.A)
    torch.nn.init.normal_(layer.bias)
    x, weights = torch.randn(2, 3, inputs).double(), torch.randn(2, 3, outputs).double()
    values = [layer.rule.A, layer.s, layer.t, layer.bias]
    expected = F.linear(x, kronecker(*values[:3]), layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-12)
    ours = torch.autograd.grad((layer(x) * weights).sum(), values)
    theirs = torch.autograd.grad((expected * weights).sum(), values)
    assert all(torch.allclose(one, other, atol=1e-11) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("init", ["zero", "normal"])
def test_the_start_and_that_every_tensor_moves(init: str) -> None:
    model, inputs = make("bert"), inputs_for("bert")
    before = output(model, inputs)
    adapter = attach(model, Compacter(width=8, init=init))
    assert torch.equal(output(model, inputs), before) == (init == "zero")
    assert torch.allclose(output(model, inputs), before, atol=1e-3)
    start = {key: p.detach().clone() for key, p in adapter.parameters().items()}
    assert {key for key, p in start.items() if float(p.abs().max()) == 0} == {
        key for key in start if key.endswith("bias") or (init == "zero" and key.endswith("up.s"))
    }
    seen = losses(model, list(adapter.parameters().values()), inputs)
    assert seen[-1] < seen[0]
    assert not [key for key, p in adapter.parameters().items() if torch.equal(p, start[key])]


@pytest.mark.parametrize("variant", ["houlsby", "parallel"])
@pytest.mark.parametrize("name", MODELS)
def test_files_come_back_with_the_shared_matrices_once(name: str, variant: str, tmp_path: Path) -> None:
    model, inputs = make(name), inputs_for(name)
    adapter = stirred(attach(model, Compacter(variant=variant, width=8)))
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert [value.shape for key, value in tensors.items() if key.endswith("rule.A")] == [(4, 4, 4)]
    bottlenecks = sum(key.endswith("down.bias") for key in tensors)
    assert sum(value.numel() for value in tensors.values()) == 4**3 + bottlenecks * 3 * (32 + 8)
    fresh = make(name)
    loaded = load_adapter(fresh, tmp_path)
    assert loaded.strategy == adapter.strategy
    assert torch.equal(output(fresh, inputs), output(model, inputs))
    for other in (loaded, copy.deepcopy(loaded)):
        rules = {id(m) for delta in other.sites.values() for m in delta.modules() if isinstance(m, PHMRule)}
        assert len(rules) == 1


def test_it_compiles_without_a_graph_break() -> None:
    model, inputs = make("llama"), inputs_for("llama")
    del inputs["labels"]
    stirred(attach(model, Compacter(variant="parallel", width=8)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**inputs).logits, output(model, inputs), atol=1e-6)


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {},
        "the bottleneck has 1. phm_dim may be 1; or the bottleneck's width 4 (reduction_factor 8)",
    ),
    ({"width": 6}, "phm_dim may be 1, 2; or the bottleneck's width 4 (reduction_factor 8) or 8 (reduction_factor 4)."),
    ({"width": 9, "phm_dim": 3}, "has 9. phm_dim may be 1."),
    ({"width": 8, "rank": 3}, "a bottleneck of 8 over phm_dim 4 leaves at most 2"),
    ({"reduction_factor": 64}, "reduction_factor 64 leaves no width"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:30])
def test_widths_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        attach(make("bert"), Compacter(**fields))


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(UserError, match="phm_dim and rank are at least 1; got 0 and 1"):
        Compacter(phm_dim=0)
    with pytest.raises(UserError, match="width is at least 1; got 0"):
        Compacter(width=0)
