"""Learning rates by name, no decay on norms and biases, matrices to Muon: which parameter is stepped in which way."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.optim import SGD, AdamW, Muon
from torch.optim.lr_scheduler import OneCycleLR

from models import make
from peftlight.errors import UserError
from peftlight.strategies import BitFit, Full, LayerNormTuning, LoRA, Stack
from peftlight.tasks import MuonAndAdamW, SequenceClassification
from tasks.small import (
    QUIET,
    assert_equal_states,
    batches,
    class_rows,
    constant,
    loader,
    quiet_trainer,
    trained,
)

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")]

ROWS = class_rows([5, 9, 4, 12, 7, 3, 8, 6], [0, 1, 2, 1, 0, 0, 2, 1])
MADE = batches(ROWS, 2)


def module(strategy: Any = None, **options: Any) -> SequenceClassification:
    torch.manual_seed(3)
    given = {"optimizer": partial(AdamW, lr=0.01), "trained_modules": ["classifier"], "lr_scheduler": constant}
    return SequenceClassification(make("bert"), strategy or LoRA(rank=2), **{**given, **options})


class EndAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def fitted(given: SequenceClassification, folder: Path, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    torch.manual_seed(3)
    trainer = quiet_trainer(folder, callbacks, **options)
    trainer.fit(given, loader(MADE), ckpt_path=ckpt_path)
    return trainer


def options_of(trainer: Any, name: str) -> dict[str, float]:
    """An option of the optimizer by the names of the parameters."""
    names = {id(p): key for key, p in trained(trainer.lightning_module.model).items()}
    return {names[id(p)]: group[name] for group in trainer.optimizers[0].param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({"classifier": 0.5}, {"classifier.": 0.5}),
        ({"layer.1": 0.5, "A": 0.25}, {".1.": 0.5, ".0.attention.self.query.deltas.default.A": 0.25,
                                       ".0.attention.self.value.deltas.default.A": 0.25}),
        ({r"layer\.(0|1)": 0.5}, {"layer": 0.5}),
        ({"layer": 0.0, "classifier.bias": 0.5}, {"layer": 0.0, "classifier.bias": 0.5}),
    ],
)  # fmt: skip
def test_a_rate_is_that_of_the_first_pattern_that_fits(
    rates: dict[str, float], expected: dict[str, float], tmp_path: Path
) -> None:
    found = options_of(fitted(module(learning_rates=rates), tmp_path), "lr")
    assert len(found) == 10
    for name, rate in found.items():
        assert rate == next((value for part, value in expected.items() if part in name), 0.01), name


@pytest.mark.parametrize(
    ("rates", "told"),
    [
        ({"clasifier": 0.1}, "'clasifier' fits no parameter that trains. Did you mean 'classifier'"),
        ({"layer.2": 0.1}, "'layer.2' fits no parameter that trains. Did you mean 'layer.1' or 'layer.0'"),
        ({"class": 0.1}, "'class' fits no parameter that trains"),
        ({"layer": 0.1, "query": 0.2}, "every parameter that 'query' fits has the rate of an earlier pattern"),
        ({"layer(": 0.1}, r"'layer\(' is no regular expression"),
        ({"layer": -0.1}, "a rate is at least 0; that of 'layer' is -0.1"),
    ],
)
def test_patterns_that_say_nothing_are_refused(rates: dict[str, float], told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"model.learning_rates: .*{told}"):
        fitted(module(learning_rates=rates), tmp_path)


def test_a_strategys_factors_are_on_the_rates_of_the_user(tmp_path: Path) -> None:
    given = module(LoRA(rank=2, lora_plus_ratio=16), learning_rates={"layer.1": 0.001})
    for name, rate in options_of(fitted(given, tmp_path), "lr").items():
        assert rate == pytest.approx((0.001 if "layer.1" in name else 0.01) * (16 if name.endswith(".B") else 1)), name


def test_norms_and_biases_are_not_decayed_by_option(tmp_path: Path) -> None:
    strategy = [BitFit(), LayerNormTuning(), LoRA(rank=2)]
    make_it = partial(AdamW, lr=0.01, weight_decay=0.3)
    found = options_of(fitted(module(Stack(strategy), optimizer=make_it, decay_norms_and_biases=False), tmp_path),
                       "weight_decay")  # fmt: skip
    spared = {name for name in found if name.endswith(".bias") or "LayerNorm" in name}
    assert {name for name, decay in found.items() if decay == 0} == spared
    assert set(found.values()) == {0.0, 0.3}
    every = options_of(fitted(module(Stack(strategy), optimizer=make_it), tmp_path), "weight_decay")
    assert set(every.values()) == {0.3}


def test_what_is_asked_for_is_what_torch_does_with_such_groups(tmp_path: Path) -> None:
    """Against the optimizer by itself, on groups that the test makes."""
    ours = module(Full(), optimizer=partial(SGD, lr=0.1, weight_decay=0.2), decay_norms_and_biases=False,
                  learning_rates={"classifier": 0.5, "embeddings": 0.02})  # fmt: skip
    fitted(ours, tmp_path)
    plain = module(Full())
    plain.configure_model()
    assert plain.model is not None
    plain.model.train()
    groups = [
        {"params": [p], "lr": 0.5 if "classifier" in name else 0.02 if "embeddings" in name else 0.1,
         "weight_decay": 0.0 if name.endswith("bias") or "LayerNorm" in name else 0.2}
        for name, p in trained(plain.model).items()
    ]  # fmt: skip
    optimizer = SGD(groups)
    for batch in MADE:
        optimizer.zero_grad()
        loss, labels = plain.loss(batch)
        (loss / labels).backward()
        optimizer.step()
    assert ours.model is not None
    assert_equal_states(trained(ours.model), trained(plain.model), rtol=1e-5, atol=1e-6)


OPTIMIZERS = {"adamw": partial(AdamW, lr=0.01), "muon": partial(MuonAndAdamW, lr=0.02, adamw_lr=0.01)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_goes_on_with_its_groups_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "learning_rates": {"classifier": 0.05, "layer.0": 0.003}, "decay_norms_and_biases": False,
        "optimizer": OPTIMIZERS[optimizer],
    }  # fmt: skip
    strategy = partial(LoRA, rank=2, lora_plus_ratio=4, bias="all")
    straight = module(strategy(), **options)
    whole = fitted(straight, tmp_path, max_epochs=2)
    first = fitted(module(strategy(), **options), tmp_path, EndAfter(5), max_epochs=2)
    first.save_checkpoint(tmp_path / "middle.ckpt")
    resumed = module(strategy(), **options)
    rest = fitted(resumed, tmp_path, max_epochs=2, ckpt_path=tmp_path / "middle.ckpt")
    assert (first.global_step, rest.global_step) == (5, 8)
    assert straight.model is not None
    assert resumed.model is not None
    for name, value in trained(straight.model).items():
        assert torch.equal(value, trained(resumed.model)[name]), name
    for name in ("lr", "weight_decay"):
        assert options_of(rest, name) == options_of(whole, name)
    content = torch.load(tmp_path / "middle.ckpt", weights_only=True)
    assert content["hyper_parameters"]["learning_rates"] == options["learning_rates"]


def test_other_groups_than_the_checkpoints_are_refused(tmp_path: Path) -> None:
    """As many of the same sizes, so that torch would give each parameter the state of another one."""
    given = {"learning_rates": {"layer.0": 0.1}, "trained_modules": []}
    fitted(module(**given), tmp_path, EndAfter(2)).save_checkpoint(tmp_path / "middle.ckpt")
    other = module(**{**given, "learning_rates": {"query": 0.1}})
    with pytest.raises(UserError, match=r"other groups of parameters.*model.learning_rates"):
        fitted(other, tmp_path, ckpt_path=tmp_path / "middle.ckpt")
    fitted(module(**{**given, "learning_rates": {"layer.0": 0.2}}), tmp_path, ckpt_path=tmp_path / "middle.ckpt")


def test_a_schedule_with_one_rate_for_all_is_refused_where_there_are_several(tmp_path: Path) -> None:
    one = partial(OneCycleLR, max_lr=0.1, total_steps=4)
    for strategy, options in ((LoRA(rank=2, lora_plus_ratio=4), {}), (None, {"learning_rates": {"classifier": 1.0}})):
        with pytest.raises(UserError, match=r"OneCycleLR gives all parameters one learning rate.*as a list"):
            fitted(module(strategy, lr_scheduler=one, **options), tmp_path)
    fitted(module(LoRA(rank=2, lora_plus_ratio=4), lr_scheduler=partial(one, max_lr=[0.1, 0.4])), tmp_path)
    fitted(module(lr_scheduler=one), tmp_path)


# ---- Muon


def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    every = list(trained(model).values())
    return [p for p in every if p.dim() == 2], [p for p in every if p.dim() != 2]


def test_matrices_are_stepped_by_muon_and_the_rest_by_adamw(tmp_path: Path) -> None:
    """Against torch's two optimizers side by side, with a schedule that moves the rate of both."""
    ours = module(BitFit(), optimizer=partial(MuonAndAdamW, lr=0.02, weight_decay=0.3, adamw_lr=0.005,
                                              adamw_weight_decay=0.1),
                  lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))  # fmt: skip
    fitted(ours, tmp_path)
    plain = module(BitFit())
    plain.configure_model()
    assert plain.model is not None
    plain.model.train()
    matrices, rest = parts(plain.model)
    assert matrices
    assert rest
    both = [Muon(matrices, 0.02, 0.3), AdamW(rest, 0.005, weight_decay=0.1)]
    for step, batch in enumerate(MADE):
        for optimizer, rate in zip(both, (0.02, 0.005), strict=True):
            optimizer.zero_grad()
            optimizer.param_groups[0]["lr"] = rate * 0.5**step
        loss, labels = plain.loss(batch)
        (loss / labels).backward()
        for optimizer in both:
            optimizer.step()
    assert ours.model is not None
    assert_equal_states(trained(ours.model), trained(plain.model), rtol=1e-4, atol=1e-5)


def test_parameters_that_are_added_later_are_parted_too() -> None:
    first, late = nn.Parameter(torch.ones(2, 2)), nn.Linear(2, 2)
    optimizer = MuonAndAdamW([first])
    optimizer.add_param_group({"params": late.parameters(), "lr": 0.5})
    kinds = [(group["matrices"], len(group["params"]), group["lr"]) for group in optimizer.param_groups]
    assert kinds == [(True, 1, 1e-3), (True, 1, 0.5), (False, 1, 0.5)]
    for parameter in (first, *late.parameters()):
        parameter.grad = torch.ones_like(parameter)
    before = [parameter.detach().clone() for parameter in (first, *late.parameters())]
    optimizer.step()
    assert all(not torch.equal(p, was) for p, was in zip((first, *late.parameters()), before, strict=True))
    again = MuonAndAdamW([first])
    again.add_param_group({"params": late.parameters()})
    again.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in again.param_groups] == [1e-3, 0.5, 0.5]
    assert len(again.state) == 3
