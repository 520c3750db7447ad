"""What holds for an adapter of any strategy on any model."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import MODELS, inputs_for, make
from peftlight import Adapter, PEFTStrategy, attach
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.strategies import BitFit, Full, LoRA
from strategies.against_peft import loss_of, losses, output
from strategies.small import stirred

STRATEGIES: dict[str, Callable[[], PEFTStrategy]] = {
    "lora": lambda: LoRA(rank=4),
    "lora with biases": lambda: LoRA(rank=4, bias="all", target_modules="all-linear"),
    "dora": lambda: LoRA(rank=4, use_dora=True),
    "pissa": lambda: LoRA(rank=4, init_lora_weights="pissa"),
    "bitfit": BitFit,
    "full": Full,
}
CASES = [
    (strategy, model)
    for strategy in STRATEGIES
    for model in MODELS
    if not (strategy == "bitfit" and model in ("llama", "t5"))
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest) -> tuple[PEFTStrategy, nn.Module, dict[str, Tensor]]:
    strategy, model = request.param
    return STRATEGIES[strategy](), make(model), inputs_for(model)


Case = tuple[PEFTStrategy, nn.Module, dict[str, Tensor]]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key
        assert value.dtype == other[key].dtype, key


@torch.no_grad()  # T5 chooses another attention kernel for a mask that requires a gradient
def computed(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return output(model, inputs)


def test_names_and_outputs_stay(case: Case) -> None:
    strategy, model, inputs = case
    before, logits = values(model), computed(model, inputs)
    attach(model, strategy)
    assert_same(before, {key: value for key, value in model.state_dict().items() if ".deltas." not in key})
    assert torch.equal(computed(model, inputs), logits)


def test_only_its_parameters_get_gradients_and_all_of_them_do(case: Case) -> None:
    strategy, model, inputs = case
    adapter = attach(model, strategy)
    stirred(adapter)
    loss_of(model, inputs).backward()
    own = adapter.parameters()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(own)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(own)


def test_the_loss_falls_and_removing_restores_the_base(case: Case) -> None:
    strategy, model, inputs = case
    before, logits = values(model), computed(model, inputs)
    adapter = attach(model, strategy)
    seen = losses(model, list(adapter.parameters().values()), inputs, steps=15)
    assert seen[-1] < seen[0]
    model.eval()
    trained = computed(model, inputs)
    assert not torch.equal(trained, logits)
    if not strategy.restorable:
        with pytest.raises(UserError, match="Full trains the base itself"):
            adapter.remove()
        return
    with adapter.disabled():
        assert torch.equal(computed(model, inputs), logits)
        with adapter.disabled():
            pass
        assert torch.equal(computed(model, inputs), logits)
    assert torch.equal(computed(model, inputs), trained)
    adapter.remove()
    assert_same(before, model.state_dict())
    assert not any(p.requires_grad for p in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert adapter.state() == {}


def test_a_copy_is_independent_and_pickles_are_equal(case: Case) -> None:
    strategy, model, inputs = case
    adapter = attach(model, strategy)
    stirred(adapter)
    logits = output(model, inputs)
    twin = copy.deepcopy(adapter)
    again: Adapter = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(output(twin.model, inputs), logits)
    assert torch.equal(output(again.model, inputs), logits)
    losses(twin.model, list(twin.parameters().values()), inputs, steps=1)
    assert torch.equal(output(model, inputs), logits)
    assert not torch.equal(output(twin.model.eval(), inputs), logits)


def test_loading_the_state_gives_equal_outputs(case: Case) -> None:
    strategy, model, inputs = case
    other = copy.deepcopy(model)
    adapter = attach(model, strategy)
    stirred(adapter)
    file = io.BytesIO()
    torch.save(adapter.state(), file)
    file.seek(0)
    attach(other, copy.deepcopy(strategy)).load_state(torch.load(file))
    assert torch.equal(output(other, inputs), output(model, inputs))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_it_compiles_without_a_graph_break(name: str) -> None:
    model, inputs = make(name), inputs_for(name)
    del inputs["labels"]  # the loss of transformers logs, which breaks the graph
    adapter = attach(model, LoRA(rank=4))
    stirred(adapter)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**inputs).logits, output(model, inputs), atol=1e-6)


def test_an_adapter_on_a_compiled_layer_is_noticed() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    before = compiled(x)
    adapter = attach(model, LoRA(rank=2, target_modules=["0"]))
    stirred(adapter)
    assert torch.equal(compiled(x), model(x))
    assert not torch.equal(compiled(x), before)


def test_a_forward_replaced_earlier_is_called_and_restored() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    own, calls = model[0].forward, []

    def hooked(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return own(*args, **kwargs) + 1

    model[0].forward = hooked
    before = model(x)
    adapter = attach(model, LoRA(rank=2, target_modules=["0"]))
    assert torch.equal(model(x), before)
    assert len(calls) == 2
    adapter.remove()
    assert model[0].forward is hooked


class _Plus(Delta):
    """y = 2 base(x) + c: does not commute, so that the order shows."""

    def __init__(self, amount: float, seen: list[bool]) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(amount))
        self.seen = seen

    def forward(self, base: Base, x: Tensor) -> Tensor:
        self.seen.append(base.direct)
        y: Tensor = base(x)
        return 2 * y + self.c


class _PlusOnFirst(PEFTStrategy):
    def __init__(self, amount: float, seen: list[bool]) -> None:
        self.amount, self.seen = amount, seen

    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [("0", _Plus(self.amount, self.seen))]


def test_two_adapters_nest_and_each_can_be_switched_off() -> None:
    torch.manual_seed(0)
    model, x, seen = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4), []
    y = model(x)
    first = attach(model, _PlusOnFirst(1.0, seen), "first")
    second = attach(model, _PlusOnFirst(3.0, seen), "second")
    assert torch.equal(model(x), 2 * (2 * y + 1) + 3)
    assert seen == [False, True]  # the outer runs first, and has the other beneath it
    with first.disabled():
        assert torch.equal(model(x), 2 * y + 3)
    with second.disabled():
        assert torch.equal(model(x), 2 * y + 1)
    first.remove()
    assert torch.equal(model(x), 2 * y + 3)
    second.remove()
    assert torch.equal(model(x), y)


def test_a_head_in_half_precision_that_became_float32_is_restored() -> None:
    model = make("bert").bfloat16()
    before = values(model)
    adapter = attach(model, LoRA(rank=2), modules_to_train=["classifier"])
    for parameter in adapter.parameters().values():
        parameter.data = parameter.data.float() + 1
    with adapter.disabled():
        assert {p.dtype for p in model.classifier.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.classifier.parameters()} == {torch.float32}
    adapter.remove()
    assert_same(before, model.state_dict())


def test_running_statistics_in_a_trained_module_are_restored() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = values(model)
    adapter = attach(model, LoRA(rank=2, target_modules=["0"]), modules_to_train=["1"])
    model(torch.randn(8, 4))
    assert "1.running_mean" in adapter.state()
    adapter.remove()
    assert_same(before, model.state_dict())


def test_a_trained_module_that_is_tied_to_another_trains_both() -> None:
    model = make("gpt2")
    adapter = attach(model, LoRA(rank=2), modules_to_train=["lm_head"])
    assert model.lm_head.weight.requires_grad
    assert "transformer.wte.weight" in adapter.parameters()
    assert "transformer.wte.weight" in adapter.state()


class _HalfWay(PEFTStrategy):
    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [("0", Delta()), ("1", Delta()), ("nowhere", Delta())]


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (_HalfWay(), {}),
        (LoRA(target_modules=["nothing"]), {}),
        (LoRA(target_modules=["0"]), {"modules_to_train": ["x"]}),
    ],
    ids=["deltas", "targets", "modules_to_train"],
)
def test_a_failed_attach_leaves_the_model_as_it_was(strategy: PEFTStrategy, options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.requires_grad_(False)
    before, flags = values(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises((UserError, AttributeError)):
        attach(model, strategy, **options)
    assert_same(before, model.state_dict())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_second_adapter_of_the_same_name_is_refused_and_the_first_stays() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    adapter = attach(model, LoRA(rank=2, target_modules=["1"]))
    stirred(adapter)
    before = model(x)
    with pytest.raises(UserError, match="'default' is already attached"):
        attach(model, LoRA(rank=2, target_modules=["0", "1"]))
    assert torch.equal(model(x), before)
    assert "forward" not in model[0].__dict__
    assert all(p.requires_grad for p in adapter.parameters().values())


@pytest.mark.parametrize("training", [False, True])
def test_dropout_follows_the_mode_of_the_model(training: bool) -> None:
    model = make("bert").train(training)
    attach(model, LoRA(dropout=0.5))
    assert {module.training for module in model.modules()} == {training}
