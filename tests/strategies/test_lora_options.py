"""The options of LoRA against the papers' equations; they merge, compile and are saved, and bad ones are refused."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import MODELS, inputs_for, make
from peftlight import Adapter, attach
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from strategies.against_peft import assert_near, loss_of, output
from strategies.test_lora_against_peft import EXTRA, TARGETS, ConvNet
from strategies.test_lora_family import FAMILY


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("method", ["dora", "pissa"])
def test_other_precisions_of_the_base(method: str, dtype: torch.dtype) -> None:
    model, x = nn.Sequential(nn.Linear(24, 16)).to(dtype), torch.randn(5, 24).to(dtype)
    before = model(x)
    adapter = attach(model, LoRA(rank=4, target_modules=["0"], **FAMILY[method]))
    assert {p.dtype for p in adapter.parameters().values()} == {torch.promote_types(dtype, torch.float32)}
    assert torch.allclose(model(x), before, rtol=1e-6, atol=0 if method == "pissa" else 1e-6)
    assert model(x).dtype == dtype
    adapted = stirred(adapter)(x)
    expected = x.double() @ weight_with(adapter, method).T + model[0].bias.double()
    assert_near(adapted.double(), expected, 1e-6 if dtype == torch.float64 else 2e-2)


def stirred(adapter: Adapter) -> nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return adapter.model


def weight_with(adapter: Adapter, method: str) -> Tensor:
    """The papers' weight of the one adapted layer, from the values that are there now, in float64."""
    (delta,), layer = adapter.sites.values(), adapter.model[0]  # type: ignore[index]
    p = {key: value.double() for key, value in delta.state_dict().items()}
    weight, scale = layer.weight.detach().double(), delta.scale
    changed = weight + scale * p["B"] @ p["A"]
    if method == "dora":
        return p["m"].unsqueeze(1) * changed / changed.norm(dim=1, keepdim=True)
    return changed - scale * p["B0"] @ p["A0"] if "B0" in p else changed


# ---- the equations of the papers


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    model = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 16))
    adapter = attach(model, LoRA(rank=4, alpha=6, target_modules=["0", "1"], rank_pattern={"1": 9}, use_rslora=True))
    assert [delta.scale for delta in adapter.sites.values()] == [6 / 2, 6 / 3]


def test_dora_detaches_the_norm() -> None:
    """Equation 11 of the paper: the gradient of the direction is scaled by m / ‖V‖, without the norm's own."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
    adapter = attach(model, LoRA(rank=2, alpha=2, target_modules=["0"], use_dora=True))
    stirred(adapter)(x).square().sum().backward()
    (delta,) = adapter.sites.values()
    A, B, m = (delta.get_parameter(key).detach().clone().requires_grad_() for key in "ABm")
    changed = model[0].weight.detach() + B @ A
    y = F.linear(x, (m / changed.detach().norm(dim=1)).unsqueeze(1) * changed, model[0].bias.detach())
    for own, gradient in zip("ABm", torch.autograd.grad(y.square().sum(), [A, B, m]), strict=True):
        assert_near(delta.get_parameter(own).grad, gradient, 1e-6, own)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dora_over_another_adapter_adds_what_it_adds_alone(dropout: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5)).eval(), torch.randn(3, 6)
    plain = model(x)
    first = attach(model, LoRA(rank=2, target_modules=["0"]), "first")
    below = stirred(first)(x)
    second = attach(model, LoRA(rank=2, target_modules=["0"], dropout=dropout, use_dora=True), "second")
    both = stirred(second)(x)
    with first.disabled():
        alone = model(x)
    assert_near(both - below, alone - plain, 1e-6)
    assert not torch.allclose(alone, plain, atol=1e-2)


def test_pissa_starts_at_the_best_approximation() -> None:
    """Eckart and Young: no matrix of rank r is nearer to W than the first r parts of its decomposition."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 16)
    (delta,) = attach(
        nn.Sequential(layer), LoRA(rank=5, target_modules=["0"], init_lora_weights="pissa")
    ).sites.values()
    A, B = delta.get_buffer("A0"), delta.get_buffer("B0")
    u, sigma, v = torch.linalg.svd(layer.weight.detach().double())
    assert_near((delta.scale * B @ A).double(), u[:, :5] * sigma[:5] @ v[:5], 1e-6)
    assert_near(A.norm(dim=1), B.norm(dim=0), 1e-6)  # the root of the values goes to both


@pytest.mark.parametrize("iterations", [None, 4])
def test_pissa_names_a_weight_that_is_not_finite(iterations: int | None) -> None:
    model = nn.Sequential(nn.Linear(16, 24))
    with torch.no_grad():
        model[0].weight[3, 4] = torch.nan
    strategy = LoRA(rank=4, target_modules=["0"], init_lora_weights="pissa", pissa_niter=iterations)
    with pytest.raises(UserError, match=r"start by pissa from the weight of 0: .* non-finite values"):
        attach(model, strategy)


def test_a_randomised_pissa_is_near_the_exact_one() -> None:
    """In a weight whose values fall fast, as those of pretrained models do."""
    torch.manual_seed(0)
    weight = torch.randn(24, 4) @ torch.randn(4, 24) + 0.01 * torch.randn(24, 24)

    def product(**options: Any) -> Tensor:
        layer = nn.Linear(24, 24)
        layer.weight.data.copy_(weight)
        strategy = LoRA(rank=4, target_modules=["0"], init_lora_weights="pissa", **options)
        (delta,) = attach(nn.Sequential(layer), strategy).sites.values()
        return delta.scale * delta.get_buffer("B0") @ delta.get_buffer("A0")

    assert (product(pissa_niter=4) - product()).norm() < 1e-3 * product().norm()
    assert not torch.equal(product(pissa_niter=4), product())


def test_olora_starts_orthonormal() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16)
    strategy = LoRA(rank=5, target_modules=["0"], init_lora_weights="olora")
    (delta,) = attach(nn.Sequential(layer), strategy).sites.values()
    A, B = delta.get_buffer("A0"), delta.get_buffer("B0")
    assert_near(B.T @ B, torch.eye(5), 1e-6)
    assert_near(B @ A, B @ B.T @ layer.weight.detach(), 1e-6)  # W projected on the first columns of Q


class Eighths(nn.Linear):
    """A linear layer that keeps its weight as whole eighths, so that it is no weight in numbers."""

    def __init__(self) -> None:
        super().__init__(12, 9)
        whole = torch.randint(-8, 8, (9, 12), dtype=torch.int8)
        self.weight = nn.Parameter(whole, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) / 8, self.bias)


@pytest.mark.parametrize("how", ["pissa", "olora"])
def test_a_quantized_weight_is_decomposed_by_what_it_computes(how: str) -> None:
    torch.manual_seed(0)
    layer, x = Eighths(), torch.randn(3, 12)
    before, plain = layer(x), nn.Linear(12, 9)
    plain.weight.data.copy_(layer.weight / 8)
    strategy = LoRA(rank=4, target_modules=["0"], init_lora_weights=how)  # type: ignore[arg-type]
    (ours,) = attach(nn.Sequential(layer), strategy).sites.values()
    (other,) = attach(nn.Sequential(plain), copy.deepcopy(strategy)).sites.values()
    products = [delta.get_buffer("B0") @ delta.get_buffer("A0") for delta in (ours, other)]
    assert_near(*products, 1e-5)
    assert torch.equal(layer(x), before)


# ---- merging


@pytest.mark.parametrize("method", ["plain", *FAMILY])
@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged_and_unmerging_restores(method: str, name: str) -> None:
    model, inputs = make(name), inputs_for(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    targets = TARGETS[name] + EXTRA[name]
    adapter = attach(model, LoRA(rank=4, target_modules=targets, **FAMILY.get(method, {})))
    adapted = output(stirred(adapter), inputs)
    adapter.merge()
    with torch.no_grad():
        assert_near(output(model, inputs), adapted, 5e-6)
    assert any(not torch.equal(before[key], value) for key, value in model.state_dict().items() if key in before)
    adapter.unmerge()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items() if key in before)
    with torch.no_grad():
        assert torch.equal(output(model, inputs), adapted.detach())


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2}, {"padding": 1, "padding_mode": "circular"}, {"dilation": 2}, {"bias": False}],
    ids=str,
)
def test_convolutions_merge(options: dict[str, Any], dora: bool) -> None:
    torch.manual_seed(0)
    model, x = ConvNet(**options), torch.randn(5, 4, 9, 8)
    adapter = attach(model, LoRA(rank=4, target_modules=["image", "line"], use_dora=dora))
    adapted = stirred(adapter)(x)
    adapter.merge()
    assert_near(model(x), adapted, 5e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_embeddings_merge(dora: bool) -> None:
    model, x = nn.Sequential(nn.Embedding(10, 6, padding_idx=2)), torch.tensor([[1, 2, 9]])
    adapter = attach(model, LoRA(rank=2, target_modules=["0"], use_dora=dora))
    adapted = stirred(adapter)(x)
    adapter.merge()
    assert_near(model(x), adapted, 1e-6)


def test_a_convolution_of_groups_cannot_be_merged() -> None:
    model = ConvNet(groups=2)
    adapter = attach(model, LoRA(rank=4, target_modules=["line", "image"]))
    with pytest.raises(UserError, match=r"merged at 'image': a convolution of 2 groups cannot hold"):
        adapter.merge()


# ---- LoRA+


def test_lora_plus_gives_b_its_own_rate() -> None:
    model = make("bert")
    strategy = LoRA(rank=4, use_dora=True, lora_plus_ratio=16, target_modules=["query", "word_embeddings"])
    adapter = attach(model, strategy, modules_to_train=["classifier"])
    rates = strategy.learning_rates(adapter)
    assert set(rates.values()) == {16}
    assert set(rates) == {key for key in adapter.parameters() if key.endswith("query.deltas.default.B")}
    assert LoRA(rank=4).learning_rates(adapter) == {}


# ---- every option as any other adapter

OPTIONS: dict[str, dict[str, Any]] = {
    **FAMILY,
    "dora with dropout": {"use_dora": True, "dropout": 0.2},
    "pissa with dropout": {"init_lora_weights": "pissa", "dropout": 0.2},
}


@pytest.mark.parametrize(
    ("method", "name"),
    [("dora", "gpt2"), ("dora with dropout", "bert"), ("pissa", "gpt2"), ("pissa with dropout", "bert")],
)
def test_it_compiles_without_a_graph_break(method: str, name: str) -> None:
    model, inputs = make(name), inputs_for(name)
    del inputs["labels"]
    adapter = attach(model, LoRA(rank=4, **OPTIONS[method]))
    stirred(adapter)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**inputs).logits, output(model, inputs), atol=1e-6)


@pytest.mark.parametrize("method", OPTIONS)
def test_under_autocast_the_norms_and_gradients_stay_whole(method: str) -> None:
    model, inputs = make("bert"), inputs_for("bert")
    adapter = attach(model, LoRA(rank=4, **OPTIONS[method]))
    stirred(adapter)
    whole = output(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, inputs)
        assert_near(output(model, inputs).float(), whole, 3e-2)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters().values())


@pytest.mark.parametrize("method", ["pissa", "olora", "pissa with rslora"])
def test_what_is_saved_is_plain_lora_of_twice_the_rank(method: str) -> None:
    model = make("bert")
    strategy = LoRA(rank=4, alpha=12, alpha_pattern={"value": 5.0}, rank_pattern={r".*1.*value": 2}, **FAMILY[method])
    adapter = attach(model, strategy, modules_to_train=["classifier"])
    expected = output(stirred(adapter), inputs_for("bert"))
    saved = adapter.finished()
    assert isinstance(saved.strategy, LoRA)
    assert saved.strategy.init_lora_weights == "default"
    assert saved.strategy.rank_pattern == {r".*1.*value": 4}
    again = attach(make("bert"), saved.strategy, modules_to_train=["classifier"])
    again.load_state(saved.state())
    for site, delta in adapter.sites.items():
        assert again.sites[site].scale == pytest.approx(delta.scale, rel=1e-12)
    assert_near(output(again.model, inputs_for("bert")), expected)
    assert "classifier.weight" in saved.state()


def test_saving_draws_no_random_number() -> None:
    adapter = attach(make("bert"), LoRA(rank=4, init_lora_weights="pissa"))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    adapter.finished()
    assert torch.equal(torch.rand(3), expected)


# ---- what is refused


def small() -> nn.Module:
    parts = {"wide": nn.Linear(24, 6), "table": nn.Embedding(5, 9), "image": nn.Conv2d(4, 8, 3, groups=2)}
    return nn.ModuleDict(parts)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "a rank above a layer's width": ({"rank": 7}, r"wide \(rank 7, at most 6\).*Set rank to 6 or below.*wide: 6"),
    "a rank above a table's": ({"rank": 6, "target_modules": ["table"]}, r"table \(rank 6, at most 5\)"),
    "a rank above a convolution's": ({"rank": 10, "target_modules": ["image"]}, r"image \(rank 10, at most 8\)"),
    "a pattern's rank": ({"rank_pattern": {"wide": 9}}, r"wide \(rank 9, at most 6\)"),
    "an unknown start": ({"init_lora_weights": "pisa"}, r"'pisa'. Did you mean 'pissa'.*default, gaussian, pissa"),
    "a start of HF PEFT": ({"init_lora_weights": True}, r"init_lora_weights is True.*Expected default"),
    "dora and pissa": ({"use_dora": True, "init_lora_weights": "pissa"}, "default or gaussian, not pissa"),
    "dora and eva": ({"use_dora": True, "init_lora_weights": "eva"}, "default or gaussian, not eva"),
    "iterations without pissa": ({"pissa_niter": 4}, "for init_lora_weights pissa; got 4 with default"),
    "no iterations": ({"pissa_niter": 0, "init_lora_weights": "pissa"}, "from 1 up"),
    "rho": ({"eva_rho": 0.5}, "eva_rho is at least 1"),
    "tau": ({"eva_tau": 1.5}, "eva_tau a cosine"),
    "ratio": ({"lora_plus_ratio": 0}, "a factor above 0; got 0"),
    "pissa of a table": ({"init_lora_weights": "pissa", "target_modules": ["table"]}, "table is a Embedding"),
    "eva of a convolution": ({"init_lora_weights": "eva", "target_modules": ["image"]}, "image is a Conv2d"),
    "dora of groups": ({"use_dora": True, "target_modules": ["image"]}, "image, a convolution of 2 groups"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_refused(case: str) -> None:
    fields, message = BAD[case]
    with pytest.raises(UserError, match=message):
        attach(small(), LoRA(**{"rank": 2, "target_modules": ["wide"], **fields}))


def test_dora_of_a_quantized_layer_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="weight of this Eighths is quantized"):
        attach(nn.Sequential(Eighths()), LoRA(rank=2, target_modules=["0"], use_dora=True))


def test_the_largest_rank_is_allowed() -> None:
    attach(small(), LoRA(rank=6, target_modules=["wide"]))
