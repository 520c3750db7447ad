"""Several adapters on one base: each computes what it did alone, in any order of switching, and row by row."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import attach, save_adapter
from peftlight.adapters import Adapters
from peftlight.errors import UserError
from peftlight.strategies import IA3, BitFit, BottleneckAdapter, Full, LoRA, PrefixTuning, PromptTuning
from peftlight.strategy import PEFTStrategy

RECIPES: dict[str, PEFTStrategy] = {
    "lora": LoRA(rank=4, target_modules=["query", "value"]),
    "dora": LoRA(rank=2, use_dora=True, target_modules=["query", "key"]),
    "ia3": IA3(),
    "bitfit": BitFit(),
    "pfeiffer": BottleneckAdapter(reduction_factor=4),
    "prefix": PrefixTuning(num_virtual_tokens=3),
    "prompt": PromptTuning(num_virtual_tokens=2),
}


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
    return found


def stirred(model: nn.Module, strategy: PEFTStrategy, seed: int, heads: tuple[str, ...] = ("classifier",)):
    adapter = attach(model, strategy, modules_to_train=heads)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapter


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """For each recipe a trained adapter's folder, and what its model computed."""
    found = {}
    for seed, (name, recipe) in enumerate(RECIPES.items()):
        model = make("bert")
        adapter = stirred(model, recipe, seed)
        save_adapter(adapter, folder := tmp_path_factory.mktemp("shelf") / name)
        found[name] = folder, logits(model, inputs_for("bert"))
    return found


@pytest.fixture
def loaded(shelf: dict[str, tuple[Path, Tensor]]) -> Adapters:
    adapters = Adapters(make("bert"))
    for name, (folder, _) in shelf.items():
        adapters.load(folder, name)
    return adapters


def test_each_of_many_computes_as_alone_in_any_order(loaded: Adapters, shelf) -> None:
    base, inputs = logits(make("bert"), inputs_for("bert")), inputs_for("bert")
    assert torch.equal(logits(loaded.model, inputs), base)
    for name in [*shelf, *reversed(shelf), "bitfit", "lora"]:
        loaded.use(name)
        assert loaded.in_use == [name]
        assert torch.equal(logits(loaded.model, inputs), shelf[name][1])
    loaded.use()
    assert torch.equal(logits(loaded.model, inputs), base)


def test_deleting_leaves_the_others_and_in_the_end_the_base_bit_for_bit(loaded: Adapters, shelf) -> None:
    before = make("bert").state_dict()
    loaded.use("ia3")
    for name in list(shelf):
        loaded.delete(name)
        assert name not in loaded.names
        if "prompt" in loaded.names:
            loaded.use("prompt")
            assert torch.equal(logits(loaded.model, inputs_for("bert")), shelf["prompt"][1])
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_name_is_given_once_and_a_wrong_one_meets_the_nearest(loaded: Adapters, shelf) -> None:
    loaded.use("dora")
    with pytest.raises(UserError, match="'lora' is taken"):
        loaded.load(shelf["ia3"][0], "lora")
    with pytest.raises(UserError, match="Did you mean 'bitfit'"):
        loaded.use("bit_fit")
    assert loaded.in_use == ["dora"]


def test_two_that_train_the_same_head_are_not_used_at_once(loaded: Adapters) -> None:
    with pytest.raises(UserError, match=r"'lora' and 'ia3' both train classifier\.weight"):
        loaded.use("lora", "ia3")


def test_two_without_a_common_tensor_work_together() -> None:
    one, two = LoRA(rank=2, target_modules=["query"]), IA3(target_modules=["value"], feedforward_modules=[])
    adapters = Adapters(make("bert"))
    adapters.attach(one, "one")
    adapters.attach(two, "two")
    adapters.use("one", "two")
    stack = make("bert")
    first, second = attach(stack, one, "one"), attach(stack, two, "two")
    for ours, theirs in ((adapters["one"], first), (adapters["two"], second)):
        for parameter, other in zip(ours.parameters().values(), theirs.parameters().values(), strict=True):
            parameter.data = torch.randn_like(parameter)
            other.data = parameter.data
    assert torch.equal(logits(adapters.model, inputs_for("bert")), logits(stack, inputs_for("bert")))


def test_what_trains_is_said_and_nothing_else_does(loaded: Adapters) -> None:
    assert not any(p.requires_grad for p in loaded.model.parameters())
    with pytest.raises(UserError, match=r"lora cannot train while off: use\('lora'\) first"):
        loaded.train("lora")
    loaded.use("lora")
    loaded.train("lora")
    trainable = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert trainable == set(loaded["lora"].parameters())
    fresh = loaded.attach(LoRA(rank=1, target_modules=["key"]), "fresh")
    assert {name for name, p in loaded.model.named_parameters() if p.requires_grad} == trainable
    loaded.use("fresh")
    loaded.train("fresh")
    loaded.model(**inputs_for("bert")).logits.sum().backward()
    assert {name for name, p in loaded.model.named_parameters() if p.grad is not None} == set(fresh.parameters())


def test_training_one_leaves_another_that_trains_the_same_tensors_as_it_was(loaded: Adapters, shelf) -> None:
    loaded.use("bitfit")
    loaded.train("bitfit")
    for parameter in loaded["bitfit"].parameters().values():
        parameter.data.add_(1.0)
    for name in ("lora", "ia3"):
        loaded.use(name)
        assert torch.equal(logits(loaded.model, inputs_for("bert")), shelf[name][1])
    loaded.use()
    assert torch.equal(logits(loaded.model, inputs_for("bert")), logits(make("bert"), inputs_for("bert")))


def test_one_that_replaces_the_whole_base_can_be_switched_too(tmp_path: Path, loaded: Adapters, shelf) -> None:
    whole = make("bert")
    save_adapter(stirred(whole, Full(), 1, ()), tmp_path)
    loaded.load(tmp_path, "full")
    for name, expected in (("full", logits(whole, inputs_for("bert"))), ("lora", shelf["lora"][1])) * 2:
        loaded.use(name)
        assert torch.equal(logits(loaded.model, inputs_for("bert")), expected)
    loaded.delete("full")
    assert torch.equal(logits(loaded.model, inputs_for("bert")), shelf["lora"][1])


@pytest.mark.parametrize("strategy", [LoRA(rank=2), IA3(), BottleneckAdapter(), LoRA(rank=2, bias="all")], ids="abcd")
def test_an_adapter_brings_a_head_of_its_own_size(tmp_path: Path, loaded: Adapters, shelf, strategy) -> None:
    wide = make("bert")
    wide.classifier = nn.Linear(32, 7)
    save_adapter(stirred(wide, strategy, 3), tmp_path)
    loaded.load(tmp_path, "wide")
    for name, expected in (("wide", logits(wide, inputs_for("bert"))), ("lora", shelf["lora"][1])) * 2:
        loaded.use(name)
        assert torch.equal(logits(loaded.model, inputs_for("bert")), expected)
    with pytest.raises(UserError, match="of other widths"), loaded.rows(["wide", "lora"]):
        logits(loaded.model, {key: value[:2] for key, value in inputs_for("bert").items()})
    loaded.delete("wide")
    assert loaded.model.state_dict()["classifier.weight"].shape == (3, 32)


def rows_apart(adapters: Adapters, names: list[str | None], inputs: dict[str, Tensor]) -> Tensor:
    parts = []
    for row, name in enumerate(names):
        adapters.use(*([name] if name else []))
        parts.append(logits(adapters.model, {key: value[row : row + 1] for key, value in inputs.items()}))
    adapters.use()
    return torch.cat(parts)


@pytest.mark.parametrize("names", [["lora", None, "ia3"], ["ia3"] * 3, [None] * 3, ["bitfit", "dora", "lora"]])
def test_a_batch_with_an_adapter_for_each_row_equals_the_rows_apart(loaded: Adapters, names: list[str | None]) -> None:
    inputs = {key: value[:1].repeat(3, *[1] * (value.dim() - 1)) for key, value in inputs_for("bert").items()}
    inputs["input_ids"] = torch.stack([row.roll(number) for number, row in enumerate(inputs["input_ids"])])
    apart = rows_apart(loaded, names, inputs)
    loaded.use("dora")
    with loaded.rows(names):
        together = logits(loaded.model, inputs)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-6)
    assert loaded.in_use == ["dora"]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generation_with_beams_takes_each_row_by_its_adapter(kind: str) -> None:
    model = make(kind)
    adapters = Adapters(model)
    for seed, (name, recipe) in enumerate({"lora": LoRA(rank=4), "ia3": IA3()}.items()):
        adapters.attach(recipe, name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapters[name].parameters().values():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
    ids = torch.tensor([[5, 6, 7], [8, 9, 5], [6, 6, 9]])
    settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    names = ["ia3", "lora", None]
    alone = []
    for row, name in enumerate(names):
        adapters.use(*([name] if name else []))
        alone.append(model.generate(input_ids=ids[row : row + 1], **settings)[0].tolist())
    with adapters.rows(names):
        together = model.generate(input_ids=ids, **settings).tolist()
    assert [row[: len(one)] for row, one in zip(together, alone, strict=True)] == alone
    assert len({tuple(row) for row in alone}) > 1


@pytest.mark.parametrize("name", ["prefix", "prompt"])
def test_what_acts_on_the_whole_batch_is_refused_for_rows(loaded: Adapters, name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' .* cannot serve single rows"), loaded.rows([name, None]):
        pass


def test_rows_that_do_not_match_the_batch_are_refused_and_all_is_put_back(loaded: Adapters, shelf) -> None:
    loaded.use("lora")
    with pytest.raises(UserError, match="said to have 7 rows"), loaded.rows(["lora"] * 7):
        logits(loaded.model, inputs_for("bert"))
    assert torch.equal(logits(loaded.model, inputs_for("bert")), shelf["lora"][1])
