"""A stack computes, trains and saves what its strategies would one on top of the other."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import Adapter, PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.report import rows_of, table_of
from peftlight.strategies import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    Full,
    HyperLoRA,
    LayerNormTuning,
    LoRA,
    PTuning,
    Stack,
)
from strategies.against_peft import losses, output
from strategies.small import stirred


def lora_and_ia3() -> list[PEFTStrategy]:
    return [LoRA(rank=4, target_modules=["key", "query"]), IA3()]


def test_it_computes_what_two_adapters_compute() -> None:
    stacked, apart, inputs = make("bert"), make("bert"), inputs_for("bert")
    adapter = stirred(attach(stacked, Stack(lora_and_ia3())))
    inner, outer = lora_and_ia3()
    attach(apart, inner, "LoRA")
    attach(apart, outer, "IA3")
    values = {
        name.replace("default.0", "LoRA").replace("default.1", "IA3"): p for name, p in adapter.parameters().items()
    }
    with torch.no_grad():
        for name, parameter in apart.named_parameters():
            if ".deltas." in name:
                parameter.copy_(values[name])
    assert torch.equal(output(stacked, inputs), output(apart, inputs))


def test_all_of_its_strategies_train_and_come_off() -> None:
    model, inputs = make("bert"), inputs_for("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapter = attach(model, Stack([*lora_and_ia3(), BitFit()]))
    start = {name: value.detach().clone() for name, value in adapter.parameters().items()}
    seen = losses(model, list(adapter.parameters().values()), inputs)
    assert seen[-1] < seen[0]
    assert all(not torch.equal(value, start[name]) for name, value in adapter.parameters().items())
    adapter.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_and_merging(tmp_path: Path) -> None:
    model, inputs = make("bert"), inputs_for("bert")
    adapter = stirred(attach(model, Stack(lora_and_ia3())))
    apart = output(model, inputs)
    save_adapter(adapter, tmp_path)
    fresh = make("bert")
    loaded = load_adapter(fresh, tmp_path)
    assert loaded.strategy == adapter.strategy
    assert torch.equal(output(fresh, inputs), apart)
    adapter.merge()
    assert torch.allclose(output(model, inputs), apart, atol=1e-5)


def test_dora_merges_first_or_not_at_all() -> None:
    """Its norms are those of the module's own weight, which the strategies beneath it would have changed."""
    dora, inputs = LoRA(rank=4, use_dora=True, target_modules=["key"]), inputs_for("bert")
    first = stirred(attach(make("bert"), Stack([dora, IA3()])))
    apart = output(first.model, inputs)
    first.merge()
    assert torch.allclose(output(first.model, inputs), apart, atol=1e-5)
    second = stirred(attach(make("bert"), Stack([IA3(), dora])))
    with pytest.raises(UserError, match=r"LinearDoRA reads the module's own weight.*Put it first"):
        second.merge()


def test_each_has_its_own_share_of_the_report() -> None:
    adapter = attach(make("bert"), Stack(lora_and_ia3()))
    assert {row.trained for row in rows_of(adapter)} == {
        "LinearLoRA",
        "OutputScale",
        "InputScale",
        "LinearLoRA, OutputScale",
    }
    column = list(table_of(adapter).columns[0].cells)
    assert column[-3:] == ["LoRA", "IA3", "all that trains"]
    lora, ia3 = adapter.strategy.parts(adapter)
    alone = {name: attach(make("bert"), each).parameters() for name, each in zip("ab", lora_and_ia3(), strict=True)}
    assert len(lora.parameters()) == len(alone["a"])
    assert len(ia3.parameters()) == len(alone["b"])


class _Shift(Delta):
    def __init__(self, start: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(start))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y + self.c


class _Hooked(PEFTStrategy):
    """Uses every hook, and writes down what it was given."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = factor, []

    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [("0", _Shift(self.factor))]

    def penalty(self, adapter: Adapter) -> Tensor:
        (own,) = adapter.parameters().values()
        return self.factor * own

    def learning_rates(self, adapter: Adapter) -> dict[str, float]:
        return dict.fromkeys(adapter.parameters(), self.factor)

    def after_step(self, adapter: Adapter, step: int, last_step: int) -> None:
        self.calls.append((list(adapter.sites), step, last_step))

    def figures(self, adapter: Adapter) -> dict[str, float]:
        return {f"factor {self.factor}": self.factor}


def test_hooks_reach_every_member_with_its_own_part() -> None:
    stack = Stack([_Hooked(2.0), _Hooked(3.0)])
    adapter = attach(nn.Sequential(nn.Linear(2, 2)), stack)
    assert float(stack.penalty(adapter).detach()) == 2 * 2 + 3 * 3
    assert stack.learning_rates(adapter) == {
        "0.deltas.default.0.c": 2.0,
        "0.deltas.default.1.c": 3.0,
    }
    stack.after_step(adapter, 4, 9)
    assert [member.calls for member in stack.strategies] == [[(["0"], 4, 9)]] * 2
    assert stack.figures(adapter) == {"factor 2.0": 2.0, "factor 3.0": 3.0}


def test_one_strategy_is_no_stack() -> None:
    with pytest.raises(UserError, match="at least two strategies; it has 1"):
        Stack([LoRA()])


def test_a_stack_with_full_fine_tuning_cannot_be_removed() -> None:
    adapter = attach(make("bert"), Stack([BottleneckAdapter(reduction_factor=4), Full()]))
    with pytest.raises(UserError, match="Stack trains the base itself"):
        adapter.remove()


def test_the_metadata_are_plain(tmp_path: Path) -> None:
    save_adapter(attach(make("bert"), Stack(lora_and_ia3())), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert [spec["class_path"].rpartition(".")[2] for spec in config["strategy"]["init_args"]["strategies"]] == [
        "LoRA",
        "IA3",
    ]


@pytest.mark.parametrize(
    "members",
    [
        [PTuning(3), LayerNormTuning()],
        [HyperLoRA(rank=4), BitFit()],
        [LoRA(rank=4, init_lora_weights="pissa"), LoRA(rank=2)],
        [Stack([LoRA(rank=20, init_lora_weights="pissa"), BitFit()]), LayerNormTuning()],
    ],
    ids=["p-tuning", "hyperlora", "two of one class", "nested"],
)
def test_what_is_saved_simpler_comes_back(members: list[PEFTStrategy], tmp_path: Path) -> None:
    model, inputs = make("bert"), inputs_for("bert")
    save_adapter(stirred(attach(model, Stack(members))), tmp_path)
    fresh = make("bert")
    load_adapter(fresh, tmp_path)
    assert torch.allclose(output(fresh, inputs), output(model, inputs), atol=1e-6)


def test_shares_add_up_beside_biases_of_adapters() -> None:
    adapter = attach(make("bert"), Stack([BottleneckAdapter(reduction_factor=4), BitFit()]))
    shares = [set(part.parameters()) for part in adapter.strategy.parts(adapter)]
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == set(adapter.parameters())


def test_saving_while_merged_saves_what_was_trained(tmp_path: Path) -> None:
    adapter = stirred(attach(make("bert"), Stack([IA3(), BitFit()])))
    before = {name: value.clone() for name, value in adapter.state().items()}
    adapter.merge()
    assert all(torch.equal(value, before[name]) for name, value in adapter.state().items())
    with pytest.raises(UserError, match="is merged; unmerge it before loading"):
        adapter.load_state(before)


class _Twice(PEFTStrategy):
    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [("0", _Shift(1.0)), ("0", _Shift(2.0))]


def test_a_member_with_two_deltas_on_a_module_is_refused() -> None:
    with pytest.raises(UserError, match="_Twice puts two deltas on 0"):
        attach(nn.Sequential(nn.Linear(2, 2)), Stack([_Twice(), _Hooked(1.0)]))


def test_it_uses_what_its_members_use() -> None:
    assert not any(Stack(lora_and_ia3()).uses(hook) for hook in ("prepare", "check_steps", "after_step"))
    assert Stack([AdaLoRA(), IA3()]).uses("after_step")
    assert Stack([LoRA(init_lora_weights="eva"), IA3()]).uses("prepare")
