"""AdaLoRA equals HF PEFT's, masks at every step included; and it meets its budget exactly, ties or not."""

import copy
import pickle
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig
from torch import Tensor, nn

from models import MODELS, inputs_for, make
from peftlight import Adapter, attach, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA
from peftlight.strategies.adalora import PrunedSVDLinear
from strategies.against_peft import by_our_names, largest_error, loss_of, output, pair, relative_error, stir
from strategies.small import stirred

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "key", "value", "dense"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
    "vit": ["q_proj", "v_proj"],
}
ENDINGS = {f"lora_{matrix}.default": f"deltas.default.{matrix}" for matrix in "AEB"}
STEPS = 20


def recipes(name: str, interval: int = 1, dropout: float = 0.0) -> tuple[AdaLoRA, AdaLoraConfig]:
    """Both sides' recipe; HF PEFT's defaults are used where it sets none."""
    targets = TARGETS[name]
    excluded = ["classifier.dense"] if name == "roberta" else None  # what its task trains whole
    ours = AdaLoRA(init_r=6, target_r=2, alpha=12, dropout=dropout, target_modules=targets, exclude_modules=excluded,
                   initial_phase=2, final_phase=6, interval=interval)  # fmt: skip
    theirs = AdaLoraConfig(init_r=6, target_r=2, lora_alpha=12, lora_dropout=dropout, target_modules=targets, tinit=2,
                           exclude_modules=excluded, tfinal=6, deltaT=interval, total_step=STEPS)  # fmt: skip
    return ours, theirs


def parity(architecture: str) -> dict[str, float]:
    """The largest relative errors; the losses are those of a training whose budget falls, with the penalty in them."""
    adapter, theirs = pair(make(architecture), *recipes(architecture))
    inputs = inputs_for(architecture)
    theirs.eval()
    stir(adapter, theirs, ENDINGS)
    named, found = by_our_names(theirs, ENDINGS), {}
    found["outputs"] = largest_error([(output(adapter.model, inputs), output(theirs, inputs))])
    our_loss(adapter, inputs).backward()
    their_loss(theirs, inputs).backward()
    gradients = [(p.grad, named[key].grad) for key, p in adapter.parameters().items()]
    found["gradients"] = largest_error((o, t) for o, t in gradients if o is not None and t is not None)
    found["losses of 20 steps"] = max(abs(o - t) / max(1.0, abs(t)) for o, t, *_ in trained(adapter, theirs, inputs))
    return found


def our_loss(adapter: Adapter, inputs: Any) -> Tensor:
    penalty = adapter.strategy.penalty(adapter)
    assert penalty is not None
    return loss_of(adapter.model, inputs) + penalty


def their_loss(theirs: nn.Module, inputs: Any) -> Tensor:
    """Past the outermost wrapper, which adds the penalty only where a task type was set."""
    return loss_of(theirs.base_model, inputs)  # type: ignore[arg-type]


Masks = dict[str, list[bool]]


def trained(adapter: Adapter, theirs: Any, inputs: Any) -> Iterator[tuple[float, float, Masks, Masks | None]]:
    """Both losses and both masks after each step of a training of both sides; HF PEFT's are None before the first."""
    theirs.train()
    random = torch.get_rng_state()
    for step, (ours, other) in enumerate(
        zip(our_steps(adapter, inputs), their_steps(theirs, inputs, random), strict=True), 1
    ):
        pattern = theirs.peft_config["default"].rank_pattern
        masks = {site: delta.get_buffer("mask").tolist() for site, delta in adapter.sites.items()}
        others = pattern and {key.replace(".lora_E.default", ""): flags for key, flags in pattern.items()}
        assert step <= STEPS
        yield ours, other, masks, others


def our_steps(adapter: Adapter, inputs: Any) -> Iterator[float]:
    adapter.model.train()
    parameters = list(adapter.parameters().values())
    optimizer, random = torch.optim.AdamW(parameters, lr=3e-3), torch.get_rng_state()
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        torch.set_rng_state(random)
        loss = our_loss(adapter, inputs)
        random = torch.get_rng_state()
        loss.backward()
        optimizer.step()
        adapter.strategy.after_step(adapter, step, STEPS)
        yield loss.item()


def their_steps(theirs: Any, inputs: Any, random: Tensor) -> Iterator[float]:
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=3e-3)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        torch.set_rng_state(random)
        loss = their_loss(theirs, inputs)
        random = torch.get_rng_state()
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        yield loss.item()


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_hf_peft(name: str) -> None:
    assert max(parity(name).values()) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_it_starts_with_the_weights_of_hf_peft(name: str) -> None:
    adapter, theirs = pair(make(name), *recipes(name))
    named = by_our_names(theirs, ENDINGS)
    assert adapter.parameters().keys() == named.keys()
    for key, parameter in adapter.parameters().items():
        assert torch.equal(parameter, named[key]), key


@pytest.mark.parametrize(("name", "interval"), [*((name, 1) for name in MODELS), ("bert", 3), ("gpt2", 3)])
def test_the_masks_are_those_of_hf_peft_at_every_step(name: str, interval: int) -> None:
    adapter, theirs = pair(make(name), *recipes(name, interval))
    everything, totals = {site: [True] * 6 for site in adapter.sites}, []
    for _, _, masks, others in trained(adapter, theirs, inputs_for(name)):
        assert masks == (others or everything)
        totals.append(sum(map(sum, masks.values())))
    layers = len(adapter.sites)
    assert totals[:2] == [6 * layers] * 2
    assert totals[13:] == [2 * layers] * 7
    assert all(later <= earlier for earlier, later in pairwise(totals))
    assert len({sum(mask) for mask in masks.values()}) > 1  # the layers did not all get the same
    assert adapter.strategy.figures(adapter) == {
        "rank/total": 2 * layers, **{f"rank/{site}": sum(mask) for site, mask in masks.items()},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_it_trains_the_same_with_dropout(name: str) -> None:
    adapter, theirs = pair(make(name, dropout=0.1), *recipes(name, dropout=0.3))
    for ours, other, *_ in trained(adapter, theirs, inputs_for(name)):
        assert ours == pytest.approx(other, rel=1e-5)


def in_training(name: str = "bert", until: int = STEPS, **fields: Any) -> Adapter:
    """An adapter after so many of the 20 steps."""
    settings = {"init_r": 6, "target_r": 2, "initial_phase": 2, "final_phase": 6, "target_modules": TARGETS[name]}
    torch.manual_seed(5)
    adapter = attach(make(name), AdaLoRA(**{**settings, **fields}))
    for _ in zip(range(until), our_steps(adapter, inputs_for(name)), strict=False):
        pass
    adapter.model.eval()
    return adapter


def masks_of(adapter: Adapter) -> list[list[bool]]:
    return [delta.get_buffer("mask").tolist() for delta in adapter.sites.values()]


def test_after_the_last_allocation_the_masks_stand_and_what_is_gone_stays_zero() -> None:
    settled = masks_of(in_training(until=14))
    for until in (15, 17, 20):
        adapter = in_training(until=until)
        assert masks_of(adapter) == settled
        for delta, mask in zip(adapter.sites.values(), settled, strict=True):
            assert [bool(value) for value in delta.get_parameter("E")[:, 0] != 0] == mask


def test_the_importance_is_that_of_the_paper() -> None:
    """Section 3.2, weight by weight, on gradients drawn at random."""
    adapter = attach(nn.Sequential(nn.Linear(5, 4)), AdaLoRA(init_r=3, target_r=1, target_modules=["0"],
                     beta1=0.7, beta2=0.6, initial_phase=0, final_phase=0))  # fmt: skip
    (delta,) = adapter.sites.values()
    smooth = {name: torch.zeros_like(p) for name, p in delta.named_parameters()}
    unsure = {name: torch.zeros_like(p) for name, p in delta.named_parameters()}
    for step in range(1, 4):
        stirred(adapter, 1.0)
        for name, parameter in delta.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            for index in torch.cartesian_prod(*map(torch.arange, parameter.shape)).tolist():
                at = tuple(index)
                now = abs(parameter[at].item() * parameter.grad[at].item())
                smooth[name][at] = 0.7 * smooth[name][at] + 0.3 * now
                unsure[name][at] = 0.6 * unsure[name][at] + 0.4 * abs(now - smooth[name][at])
        adapter.strategy.after_step(adapter, step, 100)
    score = {name: smooth[name] * unsure[name] for name in smooth}
    triplets = [
        score["E"][i, 0] + sum(score["A"][i]) / 5 + sum(score["B"][:, i]) / 4  # type: ignore[arg-type]
        for i in range(3)
    ]
    expected = [triplet == max(triplets) for triplet in triplets]
    adapter.strategy.after_step(adapter, 100, 100)
    assert delta.get_buffer("mask").tolist() == expected


def test_of_equal_singular_values_the_first_stay_and_the_budget_is_met() -> None:
    adapter = attach(make("bert"), AdaLoRA(init_r=6, target_r=2))
    adapter.strategy.after_step(adapter, 10, 10)  # nothing was ever weighed: all are equal
    assert masks_of(adapter) == [[True] * 6, [True] * 2 + [False] * 4, [False] * 6, [False] * 6]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_finite_gradients_is_not_weighed(value: float) -> None:
    adapter = in_training(until=5)
    before = {key: tensor.clone() for key, tensor in adapter.state().items() if "sensitivity" in key or "unc" in key}
    for parameter in adapter.parameters().values():
        parameter.grad = torch.ones_like(parameter)
    next(iter(adapter.parameters().values())).grad[0, 0] = value  # type: ignore[index]
    adapter.strategy.after_step(adapter, 6, STEPS)
    assert before
    assert all(torch.equal(adapter.state()[key], tensor) for key, tensor in before.items())
    assert sum(map(sum, masks_of(adapter))) == int(16 * (1 - 4 / 12) ** 3 + 8)


def test_the_penalty_in_the_form_of_the_paper() -> None:
    adapter = stirred(attach(make("gpt2"), AdaLoRA(orthogonality=0.1, orthogonality_form="squared")))
    expected = torch.zeros(())
    for delta in adapter.sites.values():
        p, q, one = delta.get_parameter("B"), delta.get_parameter("A"), torch.eye(12)
        expected = expected + 0.1 * ((p.T @ p - one).norm() ** 2 + (q @ q.T - one).norm() ** 2)
    penalty = adapter.strategy.penalty(adapter)
    assert penalty is not None
    torch.testing.assert_close(penalty, expected)
    assert AdaLoRA(orthogonality=0).penalty(adapter) is None


@pytest.mark.parametrize("until", [0, 5, STEPS])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_merged_equals_unmerged_and_comes_back_bit_for_bit(name: str, until: int) -> None:
    adapter = in_training(name, until)
    before, inputs = copy.deepcopy(adapter.model.state_dict()), inputs_for(name)
    apart = output(adapter.model, inputs)
    adapter.merge()
    assert relative_error(output(adapter.model, inputs), apart) < 1e-5
    adapter.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in adapter.model.state_dict().items())


def test_between_two_allocations_a_value_on_its_way_back_is_saved(tmp_path: Path) -> None:
    adapter = in_training(until=7, interval=5)
    (finished,) = {type(delta).__name__ for delta in adapter.finished().sites.values()}
    assert finished == "SVDLinear"
    assert all(not all(mask) for mask in masks_of(adapter))
    assert set(adapter.finished().strategy.final_ranks.values()) == {6}  # type: ignore[attr-defined]
    save_adapter(adapter, tmp_path)


def test_what_was_changed_after_the_end_is_not_saved(tmp_path: Path) -> None:
    adapter = stirred(in_training())
    with pytest.raises(UserError, match=r"over with 24 singular values, but target_r 2 over 4 layers allows 8"):
        save_adapter(adapter, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_base_in_bfloat16_keeps_its_output_type() -> None:
    adapter = attach(make("llama").bfloat16(), AdaLoRA())
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    assert output(stirred(adapter).model, inputs_for("llama")).dtype == torch.bfloat16


def test_it_compiles_and_pickles_while_it_trains() -> None:
    adapter, inputs = in_training("llama", 7), inputs_for("llama")
    del inputs["labels"]  # the loss of transformers logs, which breaks the graph
    torch._dynamo.reset()
    compiled = torch.compile(adapter.model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(**inputs).logits, output(adapter.model, inputs), atol=1e-6)
    again: Adapter = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(output(again.model, inputs), output(adapter.model, inputs))
    assert masks_of(again) == masks_of(adapter)


def test_ranks_that_were_found_are_trained_on_and_never_pruned() -> None:
    ranks = {f"bert.encoder.layer.{i}.attention.self.{name}": i * 3 for i in (0, 1) for name in ("query", "value")}
    adapter = stirred(attach(make("bert"), AdaLoRA(init_r=4, target_r=4, final_ranks=ranks)))
    assert not any(isinstance(delta, PrunedSVDLinear) for delta in adapter.sites.values())
    losses = list(our_steps(adapter, inputs_for("bert")))
    assert losses[-1] < losses[0]
    assert adapter.strategy.figures(adapter) == {"rank/total": 6, **{f"rank/{s}": rank for s, rank in ranks.items()}}
    with pytest.raises(UserError, match=r"one rank for each selected layer; .*layer.1.attention.self.value"):
        attach(make("bert"), AdaLoRA(final_ranks=dict(list(ranks.items())[:3])))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"init_r": 8, "target_r": 8}, r"are 8 and 8. Set init_r to 9 or more .*, or target_r to 7 or less"),
        ({"init_r": 1, "target_r": 1}, r"Set init_r to 2 or more \(half as much again is usual\)\.$"),
        ({"target_r": 0}, "at least one singular value for each layer; target_r is 0"),
        ({"interval": 0}, "interval is at least 1 step; got 0"),
        ({"initial_phase": -1}, "initial_phase is a whole number of steps, or a share from 0 to 1; got -1"),
        ({"final_phase": 1.5}, "final_phase is a whole number of steps, or a share from 0 to 1; got 1.5"),
        ({"beta2": 1.0}, "beta2 lies between 0 and 1; got 1.0"),
        ({"dropout": 1.0}, "dropout is a share"),
        ({"orthogonality": -0.1}, "orthogonality is a weight of at least 0; got -0.1"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdaLoRA(**fields)


def test_a_rank_above_that_of_a_layer_is_refused_with_the_layer_and_the_rank_that_fits() -> None:
    with pytest.raises(UserError, match=r"init_r is 20, but .*v_proj is 32 wide inside and 16 outside.* to 16 or less"):
        attach(make("llama"), AdaLoRA(init_r=20))
    attach(make("llama"), AdaLoRA(init_r=16))


@pytest.mark.parametrize(
    ("fields", "steps", "message"),
    [
        ({"initial_phase": 60, "final_phase": 50}, 100, r"initial_phase \(60\) takes 60 and final_phase \(50\) takes "
         r"50. They may take 99 together, and final_phase 98"),
        ({"initial_phase": 0.5, "final_phase": 0.5}, 100, r"\(0.5\) takes 50 and final_phase \(0.5\) takes 50"),
        ({"initial_phase": 0, "final_phase": 99}, 100, "final_phase 98"),
        ({}, 1, "needs at least 2 steps"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_the_steps_is_refused(fields: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdaLoRA(**fields).check_steps(steps)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [({}, 2), ({}, 100), ({"initial_phase": 49, "final_phase": 50}, 100), ({"final_phase": 98}, 100)],
)
def test_a_schedule_that_fits_is_not_refused_and_ends_at_the_target(fields: dict[str, Any], steps: int) -> None:
    strategy = AdaLoRA(**{"initial_phase": 0, **fields})
    strategy.check_steps(steps)
    budgets = [strategy.budget(step, steps, 10) for step in range(steps + 1)]
    assert (budgets[0], budgets[-1]) == (120, 80)
    assert budgets == sorted(budgets, reverse=True)
