"""Several strategies at once, as in "Towards a Unified View of Parameter-Efficient Transfer Learning".

Junxian He, Chunting Zhou, Xuezhe Ma, Taylor Berg-Kirkpatrick, Graham Neubig, 2021, https://arxiv.org/abs/2110.04366
Its MAM adapter is a prefix in the attention together with a parallel adapter beside the feed-forward part.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftlight.delta import Base, Delta, nested
from peftlight.errors import UserError
from peftlight.strategy import Adapter, Material, PEFTStrategy


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

    @property
    def members(self) -> dict[str, PEFTStrategy]:
        """The strategies by the name of their class, numbered from the second of one class on."""
        named: dict[str, PEFTStrategy] = {}
        for member in self.strategies:
            kind = type(member).__name__
            earlier = sum(type(other) is type(member) for other in named.values())
            named[f"{kind}{earlier + 1}" if earlier else kind] = member
        return named

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        sites: dict[str, dict[str, Delta]] = {}
        for name, member in self.members.items():
            for site, delta in member.deltas(model):
                sites.setdefault(site, {})[name] = delta
        for site, deltas in sites.items():
            yield site, Layers(deltas)

    def train(self, model: nn.Module) -> Iterable[str]:
        return dict.fromkeys(name for member in self.strategies for name in member.train(model))

    def parts(self, adapter: Adapter) -> Sequence[Adapter]:
        return [
            Adapter(
                f"{adapter.name}.{name}",
                adapter.model,
                member,
                sites={site: layers.deltas[name] for site, layers in _layers(adapter) if name in layers.deltas},
                trained=list(member.train(adapter.model)),
            )
            for name, member in self.members.items()
        ]

    def prepare(self, adapter: Adapter, material: Material) -> None:
        for part in self.parts(adapter):
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

    def figures(self, adapter: Adapter) -> Mapping[str, float]:
        return {name: value for part in self.parts(adapter) for name, value in part.strategy.figures(part).items()}

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
        """The deltas by the name of their strategy, the innermost first."""
        return {name: child for name, child in self.named_children() if isinstance(child, Delta)}

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        return nested(base, self.deltas.values())(*args, **kwargs)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        for place, (name, delta) in enumerate(self.deltas.items()):
            if place and delta.reads_weight:
                raise UserError(f"{name} reads the module's own weight, and the strategies before it in the stack have "
                                "changed that. Put it first.")  # fmt: skip
            weight, bias = delta.fold(weight, bias)
        return weight, bias

    def finished(self) -> Delta:
        return Layers({name: delta.finished() for name, delta in self.deltas.items()})

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        for name, delta in self.deltas.items():
            own = f"{name}."
            delta.take_shapes({key.removeprefix(own): value for key, value in state.items() if key.startswith(own)})


def _layers(adapter: Adapter) -> Iterator[tuple[str, Layers]]:
    for site, delta in adapter.sites.items():
        assert isinstance(delta, Layers)
        yield site, delta
