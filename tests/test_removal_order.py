"""Adapters that hold the same tensors of one base: switched and taken off in any order, every bit is the right one."""

import copy
import random
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.interop.base_hash import fingerprint
from peftlight.strategies import IA3, BitFit, Full, LayerNormTuning, LoRA, Stack
from peftlight.strategy import PEFTStrategy, adapters_on

HEAD = ("classifier",)
RECIPES: dict[str, tuple[Callable[[], PEFTStrategy], tuple[str, ...]]] = {
    "lora": (lambda: LoRA(rank=2, bias="all"), HEAD),
    "biases": (BitFit, HEAD),
    "norms": (LayerNormTuning, ()),
    "stack": (lambda: Stack([IA3(), BitFit()]), HEAD),
    "full": (Full, ()),
}


def logits(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**{key: value for key, value in inputs_for("bert").items() if key != "labels"}).logits
    return found


class Walk:
    """A model whose adapters come, go and are switched, beside a second account of what it has to hold."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.model, self.random = make("bert").to(dtype), random.Random(seed)
        torch.manual_seed(seed)
        self.base = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.own: dict[str, dict[str, Tensor]] = {}
        self.there: dict[str, Adapter] = {}

    def put_on(self, name: str) -> None:
        make_strategy, heads = RECIPES[name]
        adapter = attach(self.model, make_strategy(), name, modules_to_train=heads, keep_base=True)
        adapter.train_in_float32()
        for parameter in adapter.parameters().values():
            parameter.data.add_(torch.randn_like(parameter))
        self.there[name] = adapter
        self.own[name] = {key: value.clone() for key, value in adapter.state().items()}

    def take_off(self, name: str) -> None:
        self.there.pop(name).remove()
        del self.own[name]

    def load(self, name: str) -> None:
        self.own[name] = {key: torch.randn_like(value) for key, value in self.own[name].items()}
        self.there[name].load_state(self.own[name])

    def step(self) -> str:
        name = self.random.choice(sorted(RECIPES))
        if name not in self.there:
            self.put_on(name)
            return f"{name} on the model"
        acts = [self.take_off, self.load, *[lambda n: self.there[n].enable(), lambda n: self.there[n].disable()] * 2]
        act = self.random.choice(acts)
        act(name)
        return f"{name}: {act.__name__}"

    def check(self, what: str) -> None:
        expected = dict(self.base)
        on = [name for name, adapter in self.there.items() if adapter.enabled]
        for name in on:  # in the order of attaching: the last one's value is the model's
            expected |= {key: value for key, value in self.own[name].items() if key in self.base}
        now = self.model.state_dict()
        for key, value in expected.items():
            assert torch.equal(now[key], value if not on else value.to(now[key].dtype)), f"{key} after {what}"
            assert on or now[key].dtype == value.dtype
        for name, adapter in self.there.items():
            state = adapter.state()
            assert state.keys() == self.own[name].keys()
            assert all(torch.equal(state[key], value) for key, value in self.own[name].items()), f"{name} after {what}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_whatever_comes_goes_and_is_switched_the_values_are_right(seed: int, dtype: torch.dtype) -> None:
    walk, done = Walk(seed, dtype), []
    for _ in range(40):
        done.append(walk.step())
        walk.check("; ".join(done))
    for name in walk.random.sample(sorted(walk.there), len(walk.there)):
        walk.take_off(name)
        walk.check("; ".join([*done, f"{name} off the model"]))
    assert walk.model.state_dict().keys() == walk.base.keys()
    assert adapters_on(walk.model) == []
    assert vars(walk.model).keys() == vars(make("bert")).keys()


@pytest.mark.parametrize("order", list(permutations(["lora", "biases", "stack"])), ids="-".join)
def test_what_remains_computes_as_if_the_others_had_never_been(order: tuple[str, ...]) -> None:
    """In a copy of the model, too."""
    walk = Walk(0, torch.float32)
    base, alone = logits(walk.model), {}
    for name in ("lora", "biases", "stack"):
        walk.put_on(name)
    for name, adapter in walk.there.items():
        fresh = make("bert")
        make_strategy, heads = RECIPES[name]
        attach(fresh, make_strategy(), name, modules_to_train=heads).load_state(adapter.state())
        alone[name] = logits(fresh)
    twin = copy.deepcopy(walk.model)
    for model in (walk.model, twin):
        there = {adapter.name: adapter for adapter in adapters_on(model)}
        for name in order[:2]:
            there[name].remove()
        assert torch.equal(logits(model), alone[order[2]])
        there[order[2]].remove()
        assert torch.equal(logits(model), base)


def test_an_adapter_beneath_another_is_saved_and_loaded_with_its_own_values(tmp_path) -> None:
    walk = Walk(0, torch.float32)
    walk.put_on("lora")
    expected = logits(walk.model)
    walk.put_on("biases")
    save_adapter(walk.there["lora"], tmp_path)
    fresh = make("bert")
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), expected)


def test_the_base_has_one_fingerprint_under_any_number_of_adapters() -> None:
    walk = Walk(0, torch.float32)
    for name in ("norms", "biases"):
        walk.put_on(name)
    alone = attach(make("bert"), LoRA(rank=2), "third")
    above = attach(walk.model, LoRA(rank=2), "third")
    assert fingerprint(above) == fingerprint(alone)


def test_what_another_one_trains_goes_on_training_when_an_adapter_is_removed() -> None:
    model = make("bert")
    first = attach(model, LoRA(rank=2), "first", modules_to_train=HEAD)
    second = attach(model, LoRA(rank=2), "second", modules_to_train=HEAD)
    first.remove()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(second.parameters())
    second.remove()
    assert not any(p.requires_grad for p in model.parameters())


def test_running_statistics_belong_to_the_adapter_that_trains_their_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    base = copy.deepcopy(model.state_dict())
    adapters = []
    for name in ("first", "second"):
        adapters.append(attach(model, LoRA(rank=1, target_modules=["0"]), name, modules_to_train=["1"]))
        model.train()
        for _ in range(3):
            model(torch.randn(8, 4) + len(adapters)).sum().backward()
    states = [{key: value.clone() for key, value in adapter.state().items()} for adapter in adapters]
    assert not torch.equal(states[0]["1.running_mean"], states[1]["1.running_mean"])
    adapters[0].remove()
    assert torch.equal(model[1].running_mean, states[1]["1.running_mean"])
    adapters[1].remove()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in base.items())


def test_a_tensor_with_two_names_is_one() -> None:
    model = make("gpt2")  # its embeddings are its output layer
    before = model.transformer.wte.weight.detach().clone()
    first = attach(model, LoRA(rank=2, target_modules=["c_attn"]), "first", modules_to_train=["lm_head"])
    model.lm_head.weight.data.add_(1.0)
    second = attach(model, LoRA(rank=2, target_modules=["c_attn"]), "second", modules_to_train=["wte"])
    model.lm_head.weight.data.add_(1.0)
    first.remove()
    assert torch.equal(model.lm_head.weight, before + 1.0 + 1.0)
    second.remove()
    assert torch.equal(model.transformer.wte.weight, before)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_one_that_keeps_no_values_is_not_put_over_one_that_does() -> None:
    model = make("bert")
    first = attach(model, BitFit(), "first")
    with pytest.raises(
        UserError, match=r"without keeping the values of the adapter 'first'.*attach with keep_base=True"
    ):
        attach(model, Full(), "second")
    assert adapters_on(model) == [first]
    second = attach(model, Full(), "second", keep_base=True)
    first.remove()
    second.remove()


def test_a_weight_with_a_delta_in_it_is_trained_by_no_other() -> None:
    model = make("bert")
    lora = attach(model, LoRA(rank=2), "lora")
    lora.merge()
    refused = r"'lora' is merged into .*weight.*, which 'all' trains in place.*Unmerge 'lora', or disable one of them"
    with pytest.raises(UserError, match=refused):
        attach(model, Full(), "all")
    with pytest.raises(UserError, match=refused):
        attach(model, Full(), "all", keep_base=True)
    lora.disable()
    whole = attach(model, Full(), "all", keep_base=True)
    with pytest.raises(UserError, match=refused):
        lora.enable()
    whole.disable()
    lora.enable()
    lora.unmerge()
    whole.enable()
