"""What an adapter changes, as matrices: against the model with those matrices written into its weights."""

import copy

import pytest
import torch
from torch import Tensor, nn

from models import MODELS, inputs_for, make
from peftlight import Adapter, PEFTStrategy, attach
from peftlight.errors import UserError
from peftlight.linear import is_conv1d
from peftlight.matrices import Matrix, cosines, effective_rank, inner_product, weighted_sum
from peftlight.strategies import IA3, AdaLoRA, Full, LoRA, PrefixTuning, PromptTuning, VeRA
from peftlight.updates import Updates
from recipes import RECIPES
from strategies.against_peft import output
from strategies.small import stirred

UNFOLDED = {"compacter", "houlsby", "mam", "p_tuning", "parallel_adapter", "pfeiffer", "prefix", "prompt"}
LOW_RANK: dict[str, PEFTStrategy] = {
    "lora": LoRA(rank=3, target_modules="all-linear"),
    "rslora": LoRA(rank=3, use_rslora=True),
    "pissa": LoRA(rank=3, init_lora_weights="pissa"),
    "adalora": AdaLoRA(init_r=4, target_r=2),
    "vera": VeRA(rank=40),
}


def stirred_on(name: str, strategy: PEFTStrategy, heads: tuple[str, ...] = ()) -> Adapter:
    return stirred(attach(make(name).double(), strategy, modules_to_train=heads, keep_base=True))


def written(model: nn.Module, updates: Updates) -> nn.Module:
    """The bare model with every update added to its tensor."""
    for name in updates:
        site, _, leaf = name.rpartition(".")
        module, change = model.get_submodule(site), updates[name].dense()
        tensor = getattr(module, leaf)
        if leaf == "weight" and is_conv1d(module):
            change = change.T
        if name in updates.trained:  # and so is the other end of a tie
            tensor.data.add_(change.reshape(tensor.shape))
        else:
            setattr(module, leaf, nn.Parameter(tensor.detach() + change.reshape(tensor.shape)))
    return model


def computed(model: nn.Module, name: str) -> Tensor:
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs_for(name).items()}
    with torch.no_grad():
        return output(model.eval(), inputs)


@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - UNFOLDED))
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_the_base_with_the_updates_written_in_computes_what_the_adapter_does(name: str, recipe: str) -> None:
    try:
        adapter = stirred_on(name, RECIPES[recipe]())
    except UserError as refused:
        pytest.skip(str(refused))
    expected, base = computed(adapter.model, name), make(name).double()
    updates = Updates(adapter)
    assert not updates.refused
    assert len(list(updates)) == len(updates) > 0
    assert (expected - computed(base, name)).abs().max() > 1e-5
    torch.testing.assert_close(computed(written(base, updates), name), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("on", [True, False])
def test_it_is_the_same_with_the_adapter_off_or_merged(on: bool) -> None:
    adapter = stirred_on("bert", LoRA(rank=3, use_dora=True, bias="all"), ("classifier",))
    before = Updates(adapter)
    expected = {name: before[name].dense() for name in before}
    adapter.merge() if on else adapter.disable()
    after = Updates(adapter)
    assert list(after) == list(before)
    for name, change in expected.items():
        torch.testing.assert_close(after[name].dense(), change, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Embedding])
@pytest.mark.parametrize("dora", [False, True])
def test_other_kinds_of_layer(kind: type[nn.Module], dora: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(9, 6) if kind is nn.Embedding else kind(6, 4, 3)
    x = torch.tensor([[1, 4, 8]]) if kind is nn.Embedding else torch.randn(1, 6, *[7] * (layer.weight.dim() - 2))
    model = nn.Sequential(layer)
    adapter = stirred(attach(copy.deepcopy(model), LoRA(rank=2, target_modules=["0"], use_dora=dora)), 1.0)
    updates = Updates(adapter)
    with torch.no_grad():
        expected = adapter.model(x)
        torch.testing.assert_close(written(model.double(), updates)(x if x.dtype == torch.long else x.double()).float(),
                                   expected, rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("recipe", LOW_RANK)
def test_factors_give_what_the_multiplied_matrix_gives(recipe: str) -> None:
    one, two = (Updates(stirred_on("bert", LOW_RANK[recipe], heads)) for heads in ((), ("classifier",)))
    name = next(iter(one))
    first, second = one[name], two[name]
    assert first.factors is not None
    dense = first.dense()
    assert first.shape == dense.shape
    assert first.norm() == pytest.approx(float(dense.norm()))
    values = torch.linalg.svdvals(dense)
    assert first.rank == Matrix.of_tensor(dense).rank == int(torch.linalg.matrix_rank(dense, rtol=1e-5))
    for matrix in (first, Matrix.of_tensor(dense), Matrix.of_tensor(dense.T)):
        found = len(matrix.svd.S)
        assert found >= first.rank
        torch.testing.assert_close(matrix.svd.S, values[:found])
        assert float((matrix.svd.U.T @ matrix.svd.U - torch.eye(found)).abs().max()) < 1e-6
    torch.testing.assert_close((first.svd.U * first.svd.S) @ first.svd.V.T, dense)
    other = 0.3 * second.dense()
    total = weighted_sum([first, second], [2.0, -0.3])
    torch.testing.assert_close(total.dense(), 2 * dense - other)
    torch.testing.assert_close(weighted_sum([first, Matrix.of_tensor(other)], [2.0, -1]).dense(), 2 * dense - other)
    for factor in (second, Matrix.of_tensor(second.dense())):
        assert inner_product(first, factor) == pytest.approx(float((dense * second.dense()).sum()))


def test_the_effective_rank_is_the_number_of_equal_directions_and_less_of_unequal_ones() -> None:
    assert effective_rank(Matrix.of_tensor(3 * torch.eye(7)[:, :5])) == pytest.approx(5)
    assert effective_rank(Matrix.of_tensor(torch.ones(4, 6))) == pytest.approx(1)
    # By hand: shares 3/4 and 1/4.
    expected = (4 / 3) ** 0.75 * 4**0.25
    assert effective_rank(Matrix.of_tensor(torch.diag(torch.tensor([3.0, 1.0])))) == pytest.approx(expected)
    assert effective_rank(Matrix.of_tensor(torch.zeros(3, 3))) == 0


def test_principal_angles_are_those_that_turned_planes_have() -> None:
    angle = torch.tensor(0.3, dtype=torch.float64)
    plane = torch.eye(5, dtype=torch.float64)[:, :2]
    turned = plane.clone()
    turned[1, 1], turned[2, 1] = angle.cos(), angle.sin()
    mixed = turned @ torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    torch.testing.assert_close(cosines(plane, mixed).acos(), torch.stack([0 * angle, angle]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", [PrefixTuning(), PromptTuning()], ids="ab")
def test_what_is_no_change_of_a_weight_is_named(strategy: PEFTStrategy) -> None:
    updates = Updates(stirred_on("bert", strategy, ("classifier",)))
    assert set(updates) == {"classifier.weight", "classifier.bias"}
    assert all("no weight" in why for why in updates.refused.values())


def test_a_new_head_counts_from_zero() -> None:
    adapter = stirred_on("bert", IA3(), ("classifier",))
    head = adapter.model.get_parameter("classifier.weight").detach()
    assert torch.equal(Updates(adapter, new=["classifier.weight"])["classifier.weight"].dense(), head)
    assert not torch.equal(Updates(adapter)["classifier.weight"].dense(), head)


def test_a_base_trained_without_a_copy_is_refused() -> None:
    adapter = attach(make("bert"), Full())
    with pytest.raises(UserError, match="Full has trained the base itself and kept no copy"):
        Updates(adapter)


def test_every_model_is_covered() -> None:
    """What is written above for three of the models holds for LoRA on the others too."""
    for name in MODELS.keys() - {"bert", "gpt2", "t5"}:
        adapter = stirred_on(name, LoRA(rank=2))
        torch.testing.assert_close(
            computed(written(make(name).double(), Updates(adapter)), name), computed(adapter.model, name)
        )
