"""Which of the trained parameters the optimizer treats in another way: their learning rates, and their weight decay."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from peftlight.errors import UserError, listed, nearest
from peftlight.strategy import Adapter


class Treatment(NamedTuple):
    """What a group of parameters has of its own."""

    rate: float | None = None
    """In place of the optimizer's learning rate."""
    factor: float = 1.0
    """The strategy's, on the rate."""
    decays: bool = True
    """Whether the optimizer's weight decay acts on it."""


PLAIN = Treatment()
_KEY = "treatment"


@dataclass(frozen=True)
class GroupOptions:
    """What the user asked for."""

    learning_rates: Mapping[str, float] = field(default_factory=dict)
    """By patterns of names, of which the first that fits a parameter counts."""
    decay_norms_and_biases: bool = True
    """Whether weight decay acts on normalisations and biases too."""

    def __post_init__(self) -> None:
        for pattern, rate in self.learning_rates.items():
            if rate < 0:
                raise UserError(f"model.learning_rates: a rate is at least 0; that of {pattern!r} is {rate}.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"model.learning_rates: {pattern!r} is no regular expression: {error}.") from None

    def groups(self, module: nn.Module, adapter: Adapter) -> list[dict[str, Any]]:
        """The module's parameters that train, in their order, one group for each way in which they are treated.

        Raises:
            UserError: a pattern fits no parameter that trains, or none that an earlier one has left.
        """
        trained = {name.removeprefix("model."): p for name, p in module.named_parameters() if p.requires_grad}
        rates, factors = self._rates(trained), adapter.strategy.learning_rates(adapter)
        undecayed = set() if self.decay_norms_and_biases else norms_and_biases(module)
        groups: dict[Treatment, list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            treatment = Treatment(rates.get(name), factors.get(name, 1.0), id(parameter) not in undecayed)
            groups.setdefault(treatment, []).append(parameter)
        return [{"params": group, _KEY: treatment} for treatment, group in groups.items()]

    def _rates(self, names: Iterable[str]) -> dict[str, float]:
        found: dict[str, float] = {}
        for pattern, rate in self.learning_rates.items():
            hits = [name for name in names if _fits(pattern, name)]
            left = [name for name in hits if name not in found]
            if not hits:
                parts = dict.fromkeys(part for name in names for part in _runs(name, pattern.count(".") + 1))
                raise UserError(
                    f"model.learning_rates: {pattern!r} fits no parameter that trains.{nearest(pattern, parts)} "
                    "Expected a part of a name between dots, or a regular expression for one. There are "
                    f"{listed(names, 6)}."
                )
            if not left:
                raise UserError(
                    f"model.learning_rates: every parameter that {pattern!r} fits has the rate of an earlier pattern, "
                    "for the first that fits counts. Put it further up, or leave it out."
                )
            found |= dict.fromkeys(left, rate)
        return found


def treat(optimizer: Optimizer) -> Optimizer:
    """Give the optimizer's groups what was asked for them, where it has such options."""
    for group in optimizer.param_groups:
        treatment = group.pop(_KEY, PLAIN)
        if group.get("lr") is not None:
            group["lr"] = (group["lr"] if treatment.rate is None else treatment.rate) * treatment.factor
        if not treatment.decays and "weight_decay" in group:
            group["weight_decay"] = 0.0
    return optimizer


def names_in_groups(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[list[str]]:
    """The parameters of each group by their names: a checkpoint keeps the optimizer's state in this order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [[names.get(id(parameter), "") for parameter in group["params"]] for group in groups]


def refuse_other_groups(module: LightningModule, then: list[list[str]] | None) -> None:
    """See that a checkpoint has the groups that there are; torch would give a parameter the state of another one.

    Raises:
        UserError: they are not as they were.
    """
    if then is not None and then != names_in_groups(module, module.trainer.optimizers):
        raise UserError(
            "The optimizer has other groups of parameters here than in the checkpoint, so that its state does not fit "
            "them: the strategy's options, model.learning_rates or model.decay_norms_and_biases are not as they were. "
            "Give them as they were, or begin a new run."
        )


def is_plain(groups: list[dict[str, Any]]) -> bool:
    """Whether nothing has anything of its own."""
    return [group[_KEY] for group in groups] == [PLAIN]


def norms_and_biases(model: nn.Module) -> set[int]:
    """The identities of all parameters called bias, and of those of normalisations, which are known by their class."""
    return {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or "norm" in type(module).__name__.lower()
    }


def _fits(pattern: str, name: str) -> bool:
    return re.search(rf"(?:^|\.)(?:{pattern})(?:\.|$)", name) is not None


def _runs(name: str, length: int) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start : start + length]) for start in range(len(parts) - length + 1)]
