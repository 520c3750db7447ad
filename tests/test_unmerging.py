"""Unmerging gives back the weights that were there before, bit for bit."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from merging.stirred import HEADS, NEVER, scores, stirred
from models import make
from peftlight import attach, save_adapter
from peftlight.adapters import Adapters
from peftlight.errors import UserError
from peftlight.strategies import IA3, BitFit, LoRA, Stack
from recipes import RECIPES


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - NEVER))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_unmerging_restores_every_bit(name: str, dtype: torch.dtype, recipe: str) -> None:
    if (name, recipe) in {("gpt2", "bitfit_subset"), ("gpt2", "trainable_tokens")}:
        pytest.skip("it has no biases of its own for queries; its table is tied")
    adapter = stirred(make(name).to(dtype), RECIPES[recipe](), HEADS.get(name))
    before, expected = copy.deepcopy(adapter.model.state_dict()), scores(adapter.model, name)
    for _ in range(2):
        adapter.merge()
        assert adapter.sites == {} or any(
            not torch.equal(adapter.model.state_dict()[key], value) for key, value in before.items()
        )
        adapter.unmerge()
        after = adapter.model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert torch.equal(scores(adapter.model, name), expected)


def test_unmerging_after_switching_restores_every_bit(tmp_path: Path) -> None:
    adapters = Adapters(make("bert"))
    bare = copy.deepcopy(adapters.model.state_dict())
    for number, strategy in enumerate([LoRA(rank=2, bias="all"), Stack([IA3(), BitFit()])]):
        save_adapter(stirred(make("bert"), strategy, ["classifier"], 0.1 * (number + 1)), tmp_path / str(number))
        adapters.load(tmp_path / str(number), f"a{number}")
    apart = {}
    for name in adapters.names:
        adapters.use(name)
        apart[name] = scores(adapters.model, "bert")
    adapters.use("a0")
    adapters["a0"].merge()
    for name in ("a1", "a0", "a1", "a0"):
        adapters.use(name)
        torch.testing.assert_close(scores(adapters.model, "bert"), apart[name], rtol=1e-5, atol=1e-6)
    adapters.use()
    assert all(torch.equal(adapters.model.state_dict()[key], value) for key, value in bare.items())
    adapters["a0"].unmerge()  # while it is off
    for name in ("a0", "a1", "a0"):
        adapters.use(name)
        assert torch.equal(scores(adapters.model, "bert"), apart[name])
    adapters["a0"].merge()
    adapters.use("a1")
    adapters.use("a0")
    adapters["a0"].unmerge()  # while it is on, after it was off
    assert torch.equal(scores(adapters.model, "bert"), apart["a0"])
    adapters.use()
    assert all(torch.equal(adapters.model.state_dict()[key], value) for key, value in bare.items())


class Float8(nn.Linear):
    """Keeps its weight in eight-bit floats, and their scale beside it."""

    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)
        self.scale = nn.Parameter(self.weight.detach().abs().max() / 448)
        eight_bit = (self.weight.detach() / self.scale.detach()).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(eight_bit, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.scale).T


def test_eight_bit_floats_have_their_scale_elsewhere_and_are_not_merged() -> None:
    model = nn.Sequential(Float8())
    adapter = attach(model, LoRA(rank=2, target_modules=["0"]))
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(UserError, match=r"cannot be merged at '0'.*quantized \(torch\.float8_e4m3fn\)"):
        adapter.merge()
    assert torch.equal(model(x), before)
