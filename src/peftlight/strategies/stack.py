"""Several strategies at once, as in "Towards a Unified View of Parameter-Efficient Transfer Learning".

Junxian He, Chunting Zhou, Xuezhe Ma, Taylor Berg-Kirkpatrick, Graham Neubig, 2021, https://arxiv.org/abs/2110.04366
Its MAM adapter is a prefix in the attention together with a parallel adapter beside the feed-forward part.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.delta import Base, Delta, Factors, nested
from peftlight.errors import UserError
from peftlight.strategy import Adapter, Material, PEFTStrategy

_PASSED_ON = ("prepare", "check_steps", "after_step", "unmet")
"""Hooks that do something only if one of the strategies uses them."""


@dataclass
class Stack(PEFTStrategy):
    """Train several strategies together; on a module that two of them change, the later one is the outer."""

    strategies: list[PEFTStrategy]
    """The strategies, the innermost first."""

    def __post_init__(self) -> None:
        if len(self.strategies) < 2:
            raise UserError(f"Stack takes at least two strategies; it has {len(self.strategies)}.")
        self.restorable = all(member.restorable for member in self.strategies)
        self.starts_unchanged = all(member.starts_unchanged for member in self.strategies)
        self._trained: list[list[str]] = [[] for _ in self.strategies]

    def uses(self, hook: str) -> bool:
        return super().uses(hook) and (hook not in _PASSED_ON or any(member.uses(hook) for member in self.strategies))

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        sites: dict[str, dict[str, Delta]] = {}
        for number, member in enumerate(self.strategies):
            for site, delta in member.deltas(model):
                own = sites.setdefault(site, {})
                if str(number) in own:
                    raise UserError(
                        f"{type(member).__name__} puts two deltas on {site or 'the model'}; one is possible."
                    )
                own[str(number)] = delta
        for site, deltas in sites.items():
            yield site, Layers(deltas)

    def train(self, model: nn.Module) -> Iterable[str]:
        self._trained = [list(member.train(model)) for member in self.strategies]
        return dict.fromkeys(name for names in self._trained for name in names)

    def parts(self, adapter: Adapter) -> Sequence[Adapter]:
        return [
            replace(
                adapter,
                name=f"{adapter.name}.{number}",
                strategy=member,
                sites={
                    site: layers.deltas[str(number)]
                    for site, layers in _layers(adapter)
                    if str(number) in layers.deltas
                },
                trained=self._trained[number],
            )
            for number, member in enumerate(self.strategies)
        ]

    def prepare(self, adapter: Adapter, material: Material) -> None:
        # First what the model computes with from the start: another one may run the model to look at its activations.
        for part in sorted(self.parts(adapter), key=lambda part: part.strategy.starts_unchanged):
            if part.strategy.uses("prepare"):
                part.strategy.prepare(part, material)

    def learning_rates(self, adapter: Adapter) -> Mapping[str, float]:
        return {key: rate for part in self.parts(adapter) for key, rate in part.strategy.learning_rates(part).items()}

    def penalty(self, adapter: Adapter) -> Tensor | None:
        penalties = [part.strategy.penalty(part) for part in self.parts(adapter)]
        found = [penalty for penalty in penalties if penalty is not None]
        return sum(found[1:], found[0]) if found else None

    def check_steps(self, last_step: int) -> None:
        for member in self.strategies:
            member.check_steps(last_step)

    def after_step(self, adapter: Adapter, step: int, last_step: int) -> None:
        for part in self.parts(adapter):
            part.strategy.after_step(part, step, last_step)

    def unmet(self, adapter: Adapter, step: int, last_step: int) -> str | None:
        each = [part.strategy.unmet(part, step, last_step) for part in self.parts(adapter)]
        return " ".join(sentence for sentence in each if sentence) or None

    def figures(self, adapter: Adapter) -> Mapping[str, float]:
        figures: dict[str, float] = {}
        for number, part in enumerate(self.parts(adapter)):
            for name, value in part.strategy.figures(part).items():
                figures[f"{name}/{number}" if name in figures else name] = value
        return figures

    def finished(self, adapter: Adapter) -> PEFTStrategy:
        return Stack([part.strategy.finished(part) for part in self.parts(adapter)])


class Layers(Delta):
    """The deltas of several strategies on one module, each around the one before it."""

    def __init__(self, deltas: Mapping[str, Delta]) -> None:
        super().__init__()
        for name, delta in deltas.items():
            self.add_module(name, delta)

    @property
    def deltas(self) -> dict[str, Delta]:
        """The deltas by the number of their strategy, the innermost first."""
        return {name: child for name, child in self.named_children() if isinstance(child, Delta)}

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return nested(base, self.deltas.values())(*args, **kwargs)

    @property
    def folds(self) -> bool:
        return all(delta.folds for delta in self.deltas.values())

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for place, delta in enumerate(self.deltas.values()):
            if place and delta.reads_weight:
                raise UserError(
                    f"{type(delta).__name__} reads the module's own weight, and the strategies before it in the stack "
                    "have changed that. Put it first."
                )
            weight, bias = delta.fold(weight, bias)
        return weight, bias

    def factors(self) -> Factors | None:
        found = [delta.factors() for delta in self.deltas.values()]
        products = [factors for factors in found if factors is not None]
        if len(products) < len(found):
            return None
        return torch.cat([A for A, _ in products]), torch.cat([B for _, B in products], dim=1)

    def finished(self) -> Delta:
        return Layers({name: delta.finished() for name, delta in self.deltas.items()})

    def check_length(self, tokens: int) -> None:
        for delta in self.deltas.values():
            delta.check_length(tokens)

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        for name, delta in self.deltas.items():
            own = f"{name}."
            delta.take_shapes({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})


def _layers(adapter: Adapter) -> Iterator[tuple[str, Layers]]:
    for site, delta in adapter.sites.items():
        assert isinstance(delta, Layers)
        yield site, delta
