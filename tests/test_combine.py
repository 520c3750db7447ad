"""Adapters combined: against Σ wᵢ ΔWᵢ computed densely here, and against HF PEFT where it computes the same."""

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import Adapter, PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.adapters import Adapters
from peftlight.combine import Combination, combine
from peftlight.combine.methods import Settings, ties, truncated
from peftlight.errors import UserError
from peftlight.linear import weight_of, write_weight
from peftlight.matrices import Matrix, weighted_sum
from peftlight.strategies import (
    IA3,
    AdaLoRA,
    BitFit,
    Full,
    HyperLoRA,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    Stack,
    VeRA,
)
from strategies.against_peft import output
from strategies.small import stirred

pytestmark = pytest.mark.filterwarnings("ignore")
LOW_RANK: list[PEFTStrategy] = [
    LoRA(rank=3, target_modules="all-linear"),
    LoRA(rank=2, alpha=5, use_rslora=True, target_modules="attention", init_lora_weights="pissa"),
    AdaLoRA(init_r=4, target_r=2),
]
WEIGHTS = [0.7, -0.4, 1.5]


def on_one(model: nn.Module, *strategies: PEFTStrategy, heads: tuple[tuple[str, ...], ...] = ()) -> list[Adapter]:
    """The stirred adapters, all off, called a, b, c."""
    adapters = []
    for number, (name, strategy) in enumerate(zip("abcd", strategies, strict=False)):
        torch.manual_seed(number)
        own = heads[number] if heads else ()
        adapter = attach(model, copy.deepcopy(strategy), name, modules_to_train=own, keep_base=True)
        for parameter in stirred(adapter).parameters().values():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        adapter.disable()
        adapters.append(adapter)
    return adapters


def computed(model: nn.Module, name: str) -> Tensor:
    with torch.no_grad():
        return output(model.eval(), inputs_for(name))


def change(adapter: Adapter, site: str) -> Tensor:
    """ΔW (out, in) of a site, by its own merge; zero where the adapter has no delta."""
    module = adapter.model.get_submodule(site)
    before = weight_of(module).double()
    if site not in adapter.sites:
        return torch.zeros_like(before)
    delta = adapter.sites[site]
    with torch.no_grad():
        bias = getattr(module, "bias", None)
        return delta.fold(before, None if bias is None else bias.double())[0].double() - before


def sites_of(adapters: list[Adapter]) -> list[str]:
    names = {site for adapter in adapters for site in adapter.sites}
    return [name for name, _ in adapters[0].model.named_modules() if name in names]


def weighted(adapters: list[Adapter]) -> dict[str, Tensor]:
    """Σ wᵢ ΔWᵢ by site."""
    parts = {
        site: [weight * change(adapter, site) for weight, adapter in zip(WEIGHTS, adapters, strict=True)]
        for site in sites_of(adapters)
    }
    return {site: torch.stack(each).sum(0) for site, each in parts.items()}


def assert_model_has(name: str, found: Combination, dense: dict[str, Tensor]) -> None:
    """See that the adapter's model computes what the bare one does with these changes written in."""
    bare = make(name)
    for site, update in dense.items():
        module = bare.get_submodule(site)
        write_weight(module, weight_of(module).double() + update.view_as(weight_of(module)))
    expected = computed(bare, name)
    assert (expected - computed(make(name), name)).abs().max() > 3e-4
    torch.testing.assert_close(computed(found.adapter.model, name), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit"])
def test_the_sum_is_exact(name: str, tmp_path: Path) -> None:
    adapters = on_one(make(name), *LOW_RANK)
    dense = weighted(adapters)
    found = combine(adapters, WEIGHTS)
    assert found.errors.keys() == dense.keys()
    assert set(found.errors.values()) == {0.0}
    ranks = {site: len(delta.get_parameter("A")) for site, delta in found.adapter.sites.items()}
    assert ranks == {site: sum(len(a.finished().sites[site].get_parameter("A")) for a in adapters if site in a.sites)
                     for site in dense}  # fmt: skip
    assert_model_has(name, found, dense)
    # It is saved as a LoRA that the bare base gives the same outputs with.
    expected = computed(found.adapter.model, name)
    save_adapter(found.adapter, tmp_path)
    assert torch.equal(computed(load_adapter(make(name), tmp_path).model, name), expected)
    theirs = PeftModel.from_pretrained(make(name), tmp_path)
    torch.testing.assert_close(computed(theirs, name), expected, rtol=1e-5, atol=1e-5)
    found.adapter.remove()
    assert torch.equal(computed(adapters[0].model, name), computed(make(name), name))


def test_vera_and_a_network_that_writes_lora_are_summed_too() -> None:
    adapters = on_one(make("bert"), VeRA(rank=20), HyperLoRA(rank=2), Stack([LoRA(rank=2), LoRA(rank=3)]))
    dense = weighted(adapters)
    assert_model_has("bert", combine(adapters, WEIGHTS), dense)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Embedding])
def test_convolutions_and_embeddings_are_summed(kind: type[nn.Module]) -> None:
    layer = nn.Embedding(9, 6) if kind is nn.Embedding else kind(6, 4, 3)
    x = torch.tensor([[1, 4, 8]]) if kind is nn.Embedding else torch.randn(1, 6, *[7] * (layer.weight.dim() - 2))
    adapters = on_one(nn.Sequential(layer), *(LoRA(rank=rank, target_modules=["0"]) for rank in (1, 3)))
    bare = copy.deepcopy(layer)
    for weight, adapter in zip((2.0, -1.0), adapters, strict=True):
        bare.weight.data += weight * change(adapter, "0")
    for method, rank in (("sum", None), ("svd", 4)):
        found = combine(adapters, [2.0, -1.0], method, rank=rank)
        torch.testing.assert_close(found.adapter.model(x), bare(x), rtol=1e-5, atol=1e-5)
        found.adapter.remove()


@pytest.mark.parametrize("second", [LoRA(rank=2, use_dora=True), LoRA(rank=2)], ids=["dora", "lora"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_svd_is_the_best_of_its_rank_and_says_how_far_it_is_off(name: str, second: LoRA) -> None:
    adapters = on_one(make(name), LoRA(rank=3), second)
    found, dense = combine(adapters, [1, -2], "svd", rank=2), {}
    for site in sites_of(adapters):
        total = change(adapters[0], site) - 2 * change(adapters[1], site)
        U, S, Vt = torch.linalg.svd(total)
        dense[site] = U[:, :2] @ S[:2].diag() @ Vt[:2]
        error = float(torch.linalg.norm(total - dense[site]) / torch.linalg.norm(total))
        assert found.errors[site] == pytest.approx(error, rel=1e-4)
        assert error > 0.05
    assert_model_has(name, found, dense)


def test_directions_that_float64_tells_apart_are_not_dropped() -> None:
    """As high as a vocabulary, with the second adapter's directions a hundredth of the first's."""
    torch.manual_seed(0)
    one, two = (Matrix.of_factors((torch.randn(2, 64), scale * torch.randn(60_000, 2))) for scale in (1, 0.001))
    total = weighted_sum([one, two], [1.0, 1.0])
    assert total.rank == 4
    kept, error = truncated(total, 4)
    torch.testing.assert_close(kept.dense(), total.dense(), rtol=1e-9, atol=1e-9)
    assert error < 1e-12
    kept, error = truncated(total, 3)
    assert error == pytest.approx(float((total.dense() - kept.dense()).norm() / total.dense().norm()))
    assert error > 1e-4


def test_ties_keeps_a_number_of_even_the_smallest_tensor() -> None:
    tensor = Matrix.of_tensor(torch.tensor([1.0, -3.0, 2.0]))
    kept = ties([tensor], [1.0], Settings(0.2, torch.Generator()))
    assert kept.dense().flatten().tolist() == [0, -3, 0]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers(density: float) -> None:
    adapters = on_one(make("bert"), *(LoRA(rank=rank, target_modules=["value"]) for rank in (2, 3, 4)))
    found, dense = combine(adapters, WEIGHTS, "ties", density=density, rank=32), {}
    for site in sites_of(adapters):
        trimmed = []
        for weight, adapter in zip(WEIGHTS, adapters, strict=True):
            update = change(adapter, site).flatten()
            least = update.abs().sort(descending=True).values[int(density * len(update)) - 1]
            trimmed.append([weight * float(value) if abs(value) >= least else 0.0 for value in update])
        merged = []
        for values in zip(*trimmed, strict=True):
            agreeing = [value for value in values if value * sum(values) > 0]
            merged.append(sum(agreeing) / max(len(agreeing), 1))
        dense[site] = torch.tensor(merged, dtype=torch.float64).view(32, 32)
    assert max(found.errors.values()) < 1e-6
    assert_model_has("bert", found, dense)


def test_dare_drops_at_random_and_by_its_seed() -> None:
    adapters = on_one(make("bert"), *LOW_RANK)
    generator, dense = torch.Generator().manual_seed(7), {}
    for site in sites_of(adapters):
        dense[site] = torch.zeros_like(change(adapters[0], site))
        for weight, adapter in zip(WEIGHTS, adapters, strict=True):
            if site in adapter.sites:
                update = change(adapter, site)
                kept = torch.rand(update.shape, generator=generator) < 0.3
                dense[site] += weight * torch.where(kept, update / 0.3, 0)
    found = combine(adapters, WEIGHTS, "dare", density=0.3, rank=32, seed=7)
    assert_model_has("bert", found, dense)
    expected = computed(found.adapter.model, "bert")
    found.adapter.remove()
    assert not torch.allclose(computed(combine(adapters, WEIGHTS, "dare", density=0.3, rank=32, seed=8).adapter.model,
                                       "bert"), expected, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_what_the_rank_cannot_hold_is_said(method: str) -> None:
    adapters = on_one(make("bert"), LoRA(rank=3), LoRA(rank=2))
    found = combine(adapters, method=method)
    assert all(len(delta.get_parameter("A")) == 3 for delta in found.adapter.sites.values())
    assert all(0.1 < error < 1 for error in found.errors.values())


@pytest.mark.parametrize(("method", "theirs"), [("sum", "cat"), ("svd", "svd"), ("ties", "ties_svd")])
def test_hf_peft_combines_alike(method: str, theirs: str) -> None:
    adapters = on_one(make("bert"), LoRA(rank=3), LoRA(rank=2, alpha=7))
    model = get_peft_model(make("bert"), LoraConfig(r=3, lora_alpha=16, target_modules=["query", "value"]), "a")
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=7, target_modules=["query", "value"]))
    modules = dict(model.named_modules())
    with torch.no_grad():
        for adapter in adapters:
            for site, delta in adapter.sites.items():
                for part in "AB":
                    there = modules[f"base_model.model.{site}.lora_{part}.{adapter.name}"].weight
                    there.copy_(delta.get_parameter(part))
    options = {} if method == "sum" else {"svd_rank": 4}
    if method == "ties":
        options["density"] = 0.5
    model.add_weighted_adapter(["a", "b"], [0.6, 0.6], "c", combination_type=theirs, **options)
    ours = combine(adapters, [0.6, 0.6], method, rank=options.get("svd_rank"), density=options.get("density"))
    for site, delta in ours.adapter.sites.items():
        expected = modules[f"base_model.model.{site}"].get_delta_weight("c")
        A, B = delta.factors()
        torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-6)


BIASES = [LoRA(rank=2, bias="all"), BitFit(), LayerNormTuning(), IA3()]


def test_what_is_trained_in_place_is_summed(tmp_path: Path) -> None:
    adapters, bare = on_one(make("bert"), *BIASES[:3]), make("bert")
    tensors = dict(bare.named_parameters())
    base = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    dense = {site: WEIGHTS[0] * change(adapters[0], site) for site in adapters[0].sites}
    for weight, adapter in zip(WEIGHTS, adapters, strict=True):
        for name in adapter.originals:
            tensors[name].data += weight * (adapter.state()[name] - base[name])
    for site, update in dense.items():
        bare.get_submodule(site).weight.data += update
    assert "classifier.bias" in adapters[0].originals  # half a head, with the base's weight: a bias like all others
    found = combine(adapters, WEIGHTS)
    expected = computed(bare, "bert")
    torch.testing.assert_close(computed(found.adapter.model, "bert"), expected, rtol=1e-5, atol=1e-5)
    save_adapter(found.adapter, tmp_path)
    torch.testing.assert_close(computed(load_adapter(make("bert"), tmp_path).model, "bert"), expected,
                               rtol=1e-5, atol=1e-5)  # fmt: skip


def test_ia3_becomes_a_lora_with_biases() -> None:
    (adapter,) = on_one(make("bert"), IA3())
    adapter.enable()
    expected = computed(adapter.model, "bert")
    found = combine([adapter], [1.0], "svd", rank=64)
    assert not adapter.enabled
    torch.testing.assert_close(computed(found.adapter.model, "bert"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategies", [[Full(), Full()], [BitFit(), LayerNormTuning()]], ids=["full", "two"])
def test_what_adds_nothing_to_the_base_is_combined_in_place(strategies: list[PEFTStrategy], tmp_path: Path) -> None:
    adapters, bare = on_one(make("gpt2"), *strategies), make("gpt2")
    tensors = dict(bare.named_parameters())
    base = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    for weight, adapter in zip((0.25, 0.5), adapters, strict=True):
        for name in adapter.originals.keys() & base.keys():
            tensors[name].data += weight * (adapter.state()[name] - base[name])
    found = combine(adapters, (0.25, 0.5))
    torch.testing.assert_close(computed(found.adapter.model, "gpt2"), computed(bare, "gpt2"), rtol=1e-5, atol=1e-5)
    assert not found.adapter.sites
    save_adapter(found.adapter, tmp_path)
    load_adapter(make("gpt2"), tmp_path)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_head_comes_whole_from_one_adapter(kind: str, tmp_path: Path) -> None:
    adapters = on_one(make(kind), LoRA(rank=2), LoRA(rank=3), heads=(("classifier",), ("classifier",)))
    with pytest.raises(UserError, match=r"a, b each train a head \(classifier\..*Say whose is kept: heads_from a"):
        combine(adapters)
    with pytest.raises(UserError, match=r"heads_from is 'c'.*Heads are trained by a, b"):
        combine(adapters, heads_from="c")
    found = combine(adapters, [0.5, 0.5], heads_from="b")
    for name, value in found.adapter.state().items():
        if name.startswith("classifier"):
            assert torch.equal(value, adapters[1].state()[name])
    expected = computed(found.adapter.model, kind)
    save_adapter(found.adapter, tmp_path)
    assert torch.equal(computed(load_adapter(make(kind), tmp_path).model, kind), expected)


def test_half_a_head_is_none_and_is_not_dropped_unasked() -> None:
    adapters = on_one(make("bert"), LoRA(rank=2), LoRA(rank=2, bias="all"), heads=(("classifier",), ()))
    with pytest.raises(UserError, match=r"a, b each train a head \(classifier.bias, classifier.weight\).*heads_from a"):
        combine(adapters)
    with pytest.raises(UserError, match=r"heads_from is 'b'.*Heads are trained by a"):
        combine(adapters, heads_from="b")
    model = combine(adapters, heads_from="a").adapter.model
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(model.get_parameter(name), adapters[0].state()[name])


def test_the_only_head_is_kept_without_being_asked_for() -> None:
    adapters = on_one(make("bert"), LoRA(rank=2), LoRA(rank=3), heads=((), ("classifier",)))
    found = combine(adapters, [0.5, 0.5])
    assert torch.equal(found.adapter.model.classifier.weight, adapters[1].state()["classifier.weight"])
    adapters[1].enable()  # which brings its own head
    assert found.adapter.enabled


def test_what_cannot_be_combined_is_named_and_leaves_all_as_it_was() -> None:
    model = make("bert")
    one, two, three = on_one(model, LoRA(rank=2), PrefixTuning(num_virtual_tokens=2), IA3())
    one.enable()
    expected, names = computed(model, "bert"), [name for name, _ in model.named_parameters()]
    with pytest.raises(UserError, match=r"'b' \(PrefixTuning\) cannot be combined.*LoRA and its relatives"):
        combine([one, two])
    with pytest.raises(UserError, match=r"no product of low rank.*method svd"):
        combine([one, three])
    with pytest.raises(UserError, match="say which rank"):
        combine([three], method="svd")
    assert torch.equal(computed(model, "bert"), expected)
    assert [name for name, _ in model.named_parameters()] == names


def test_a_third_adapter_that_is_on_has_no_part_in_it() -> None:
    model = make("bert")
    one, two, third, scaled = on_one(model, LoRA(rank=2, bias="all"), LoRA(rank=2, bias="all"), BitFit(), IA3())
    expected = combine([one, two]).adapter
    without = computed(model, "bert")
    expected.remove()
    third.enable()
    with pytest.raises(UserError, match="no product of low rank"):
        combine([one, scaled])
    assert third.enabled
    found = combine([one, two])
    assert not third.enabled
    assert torch.equal(computed(model, "bert"), without)
    found.adapter.remove()
    assert torch.equal(computed(model, "bert"), computed(make("bert"), "bert"))


def test_a_combination_is_one_of_the_bases_adapters() -> None:
    adapters, bare = Adapters(make("bert")), computed(make("bert"), "bert")
    for name, strategy in (("a", LoRA(rank=2, bias="all")), ("b", LoRA(rank=3)), ("c", BitFit())):
        torch.manual_seed(len(adapters))
        adapter = adapters.attach(strategy, name)
        adapters.use(name)
        stirred(adapter)
    third = computed(adapters.model, "bert")
    found = adapters.combine(["a", "b"], [0.5, 2.0], name="both")
    assert adapters["both"] is found.adapter
    assert adapters.in_use == ["c"]
    assert torch.equal(computed(adapters.model, "bert"), third)
    assert not any(parameter.requires_grad for parameter in adapters.model.parameters())
    adapters.use("both")
    assert (computed(adapters.model, "bert") - bare).abs().max() > 1e-4
    adapters.use()
    assert torch.equal(computed(adapters.model, "bert"), bare)
    with pytest.raises(UserError, match="'both' is taken"):
        adapters.combine(["a", "b"], name="both")


def test_arguments_that_do_not_fit_are_refused() -> None:
    one, two = on_one(make("bert"), LoRA(rank=2), LoRA(rank=3))
    (other,) = on_one(make("bert"), LoRA(rank=2))
    with pytest.raises(UserError, match=r"method is 'tie'. Did you mean 'ties'"):
        combine([one, two], method="tie")
    with pytest.raises(UserError, match=r"one finite weight for each of a, b; got 1.0"):
        combine([one, two], [1.0])
    with pytest.raises(UserError, match=r"rank is a number from 1 up.*got 3 with sum"):
        combine([one, two], rank=3)
    with pytest.raises(UserError, match=r"density is a share above 0 up to 1.*got 1.5 with ties"):
        combine([one, two], method="ties", density=1.5)
    with pytest.raises(UserError, match="on one model and have different names; got a, a"):
        combine([one, other])
    with pytest.raises(UserError, match="got -"):
        combine([])
