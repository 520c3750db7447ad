"""The conformance kit finds what it is there to find."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import inputs_for
from peftlight import PEFTStrategy
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.strategies import IA3, Full
from peftlight.testing import check_strategy
from peftlight.testing.conformance import CHECKS, Tiny

ON_BERT = {"bert": (Tiny("bert"), inputs_for("bert"))}
SITE = "bert.encoder.layer.0.output.dense"


def test_a_good_strategy_keeps_every_promise() -> None:
    results = check_strategy(IA3, leave_out=["two processes"])
    assert {result.outcome for result in results} == {"kept"}
    assert {result.check for result in results} == set(CHECKS)


class _Scale(Delta):
    """A good delta, of which the broken ones below change one line."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(32))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return (y * self.l).to(y.dtype)


class _StartsElsewhere(_Scale):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.full((32,), 1.5))


class _HasADeadTensor(_Scale):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))


class _WritesTheBase(_Scale):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        base.module.bias.data.add_(1e-3)
        return super().forward(base, x)


class _MergesWrongly(_Scale):
    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.l[:, None], bias  # the bias is scaled too


class _KeepsStateThatIsNotSaved(_Scale):
    steps = 0

    def forward(self, base: Base, x: Tensor) -> Tensor:
        self.steps += self.training
        return super().forward(base, x) * (1 + 0.1 * self.steps)


class _CannotBeCopied(_Scale):
    def __init__(self) -> None:
        super().__init__()
        self.act = lambda y: y


class _LosesPrecision(_Scale):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return (y * self.l * float("inf")).to(y.dtype) if y.dtype == torch.bfloat16 else super().forward(base, x)


class _DrawsAgain(_Scale):
    """What a forward draws outside of torch's generator, checkpointing cannot draw again."""

    calls = 0

    def forward(self, base: Base, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(base, x) * (100 if self.training and self.calls % 2 == 0 else 1)


class _DependsOnTheProcess(_Scale):
    def forward(self, base: Base, x: Tensor) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return super().forward(base, x) * (1 + rank)


@dataclass
class _On(PEFTStrategy):
    delta: str

    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [(SITE, globals()[self.delta]())]


@pytest.mark.parametrize(
    ("delta", "check", "words"),
    [
        (_StartsElsewhere, "starts as it claims", "yet it claims not to"),
        (_HasADeadTensor, "trains only its own", "no gradient: .*unused"),
        (_WritesTheBase, "trains only its own", f"training changed the frozen {SITE}.bias"),
        (_MergesWrongly, "merges", "merged, the output differs"),
        (_KeepsStateThatIsNotSaved, "resumes", "resumed, training ended elsewhere"),
        (_KeepsStateThatIsNotSaved, "saves and loads", "loaded from files, the output differs"),
        (_CannotBeCopied, "copies", "pickle"),
        (_LosesPrecision, "bfloat16", "not finite"),
        (_DrawsAgain, "gradient checkpointing", "the gradients differ"),
    ],
)
def test_a_broken_promise_is_named(delta: type[Delta], check: str, words: str) -> None:
    leave_out = [*CHECKS.keys() - {check}, "two processes"]
    with pytest.raises(AssertionError, match=rf"bert, {check}: broken \((.|\n)*{words}"):
        check_strategy(lambda: _On(delta.__name__), ON_BERT, leave_out=leave_out)


@pytest.mark.slow
def test_processes_that_disagree_are_found() -> None:
    with pytest.raises(AssertionError, match=rf"two processes: broken \(gradients differ .*{SITE}.deltas.default.l"):
        check_strategy(partial(_On, "_DependsOnTheProcess"), ON_BERT, leave_out=CHECKS)


def test_what_cannot_be_removed_says_so() -> None:
    results = check_strategy(Full, ON_BERT, leave_out=[*CHECKS.keys() - {"comes off"}, "two processes"])
    assert [result.remark for result in results] == ["trains the base itself, so it cannot be removed"]


@dataclass
class _RefusesAll(PEFTStrategy):
    def deltas(self, model: nn.Module) -> Any:
        raise UserError("not this one")


def test_a_strategy_that_serves_nothing_is_no_success() -> None:
    with pytest.raises(AssertionError, match="serves none of the models bert: not this one"):
        check_strategy(_RefusesAll, ON_BERT, leave_out=["two processes"])
