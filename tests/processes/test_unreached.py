"""A trained tensor that the loss does not depend on is named before the first step, in every process alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import peftlight.tasks.base as tasks
from models import make
from peftlight import PEFTStrategy
from peftlight.delta import Delta
from peftlight.errors import UserError
from peftlight.processes import FSDP2Strategy
from peftlight.strategies import Full
from peftlight.tasks import CausalLM
from processes.worlds import spawn
from tasks.small import batches, loader, quiet_trainer, token_rows

SITE = "model.layers.1.mlp.down_proj"


class Shift(Delta):
    """h = W x + b + shift, and a tensor that some processes leave out."""

    def __init__(self, width: int, used_by: list[int]) -> None:
        super().__init__()
        self.shift, self.sometimes = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.used_by = used_by

    def forward(self, base: Any, x: Tensor) -> Tensor:
        y: Tensor = base(x) + self.shift
        return y + self.sometimes if dist.get_rank() in self.used_by else y


@dataclass
class Shifted(PEFTStrategy):
    """A strategy with that one delta."""

    used_by: list[int]

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        yield SITE, Shift(32, self.used_by)


def outcome(strategy: Any, used_by: list[int], folder: Path) -> str:
    """What a training of two steps in two processes says."""
    module = CausalLM(make("llama"), Shifted(used_by))
    trainer = quiet_trainer(folder, strategy=strategy, devices=2, use_distributed_sampler=False)
    try:
        trainer.fit(module, loader(batches(token_rows([5, 6, 7, 8]), 2)))
    except UserError as error:
        return str(error)
    return "trained"


def of_full(strategy: Any, folder: Path) -> str:
    """What a full fine-tuning of a model says that has a parameter which no forward reads."""
    model = make("llama")
    model.model.register_parameter("unread", nn.Parameter(torch.ones(32)))  # type: ignore[union-attr]
    module = CausalLM(model, Full())
    trainer = quiet_trainer(folder, strategy=strategy, devices=2, use_distributed_sampler=False)
    try:
        trainer.fit(module, loader(batches(token_rows([5, 6, 7, 8]), 2)))
    except UserError as error:
        return str(error)
    assert module.verdict is not None
    return f"trained, left: {module.verdict.still}"


def one_process(rank: int, processes: int, folder: Path) -> None:
    tasks.keep_watch = lambda trainer: None  # type: ignore[attr-defined]  # so that each process says what it found
    ways = {
        "ddp": lambda: "ddp",
        "fsdp2": FSDP2Strategy,
        "replicated": lambda: FSDP2Strategy(shard_adapter=False),
        "finding": lambda: "ddp_find_unused_parameters_true",
    }
    found: dict[tuple[str, tuple[Any, ...]], str] = {
        (way, used_by): outcome(make_strategy(), list(used_by), folder)
        for way, make_strategy in ways.items() for used_by in ((), (1,), (0, 1))
    }  # fmt: skip
    found |= {(way, ("full",)): of_full(make_strategy(), folder) for way, make_strategy in ways.items()}
    torch.save(found, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, tuple[Any, ...]], str]]:
    """What each of the two processes said."""
    folder = tmp_path_factory.mktemp("unreached")
    spawn(one_process, 2, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


pytestmark = pytest.mark.slow
Said = list[dict[tuple[str, tuple[Any, ...]], str]]


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "replicated"])
def test_what_no_process_reaches_is_named(way: str, said: Said) -> None:
    for process in said:
        assert "1 of 2 trained tensors had no gradient in the first step" in process[way, ()]
        assert "sometimes" in process[way, ()]


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "replicated"])
def test_what_one_process_does_not_reach_is_named_in_both(way: str, said: Said) -> None:
    for process in said:
        assert "in some of the 2 processes" in process[way, (1,)]
        assert f"{SITE}.deltas.default.sometimes" in process[way, (1,)]
        assert "ddp_find_unused_parameters_true" in process[way, (1,)]


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "replicated", "finding"])
def test_what_all_reach_trains(way: str, said: Said) -> None:
    assert [process[way, (0, 1)] for process in said] == ["trained", "trained"]


def test_ddp_can_be_told_to_find_them(said: Said) -> None:
    assert [process["finding", (1,)] for process in said] == ["trained", "trained"]
    assert all("had no gradient in the first step" in process["finding", ()] for process in said)


def test_full_leaves_what_no_forward_reads_and_under_ddp_says_with_which_option(said: Said) -> None:
    for process in said:
        assert "model.unread" in process["ddp", ("full",)]
        assert "Set --trainer.strategy ddp_find_unused_parameters_true" in process["ddp", ("full",)]
        for way in ("finding", "fsdp2", "replicated"):
            assert process[way, ("full",)] == "trained, left: ['model.unread']"
