"""How far an adapter moves each tensor of its base, in numbers."""

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from peftlight.delta import CHILD
from peftlight.errors import UserError
from peftlight.matrices import Matrix, effective_rank
from peftlight.paths import place_of
from peftlight.strategy import Adapter
from peftlight.updates import Updates


@dataclass(frozen=True)
class Measured:
    """One tensor of the base and its change; or one of an adapter's own, where it changes no tensor of the base."""

    name: str
    how: str
    """The class of the delta, "in place", or "new" for a head that the base's files do not hold."""
    shape: list[int]
    parameters: int
    """How many numbers the adapter trains for this; 0 where those of another row do."""
    norm: float
    """‖ΔW‖_F; of a new head, and of what changes no tensor of the base, the norm of the values."""
    base: float | None = None
    """‖W‖_F; None where there is no W, or where it is quantized."""
    rank: int | None = None
    """Of ΔW; None for vectors."""
    effective_rank: float | None = None
    """exp of the entropy of the singular values' shares; see `peftlight.matrices.effective_rank`."""

    @property
    def relative(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F."""
        return self.norm / self.base if self.base else None


class Changes(Mapping[str, Matrix]):
    """All that an adapter is, as matrices: its `Updates`; its own tensors at modules of which it changes no weight."""

    def __init__(self, adapter: Adapter, new: Collection[str] = ()) -> None:
        """
        Args:
            adapter: on a base with no other adapter in use.
            new: tensors that the base's files do not hold.
        """
        self.updates, self.parameters = Updates(adapter, new), _own_parameters(adapter)
        self.own = {
            f"{site}: {key}".lstrip(": "): (site, value)
            for site in self.updates.refused
            for key, value in self.parameters.get(site, {}).items()
        }
        """Own tensors with the modules that they are on."""

    def __iter__(self) -> Iterator[str]:
        yield from [*self.updates, *self.own]

    def __len__(self) -> int:
        return len(self.updates) + len(self.own)

    def __contains__(self, name: object) -> bool:
        return name in self.updates or name in self.own

    def __getitem__(self, name: str) -> Matrix:
        return Matrix.of_tensor(self.own[name][1]) if name in self.own else self.updates[name]


def measure(changes: Changes) -> list[Measured]:
    """A row for each of the changes, in their order."""
    rows = []
    for name, change in changes.items():
        size = (change.rank, effective_rank(change)) if min(change.shape) > 1 else (None, None)
        how, parameters = _origin(changes, name)
        shape = [length for length in change.shape if length > 1] or [1]
        rows.append(Measured(name, how, shape, parameters, change.norm(), _base_norm(changes, name), *size))
    return rows


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


def together(rows: Iterable[T], by: Callable[[_Named], str]) -> dict[str, list[T]]:
    """The rows in groups, in the order of their first."""
    groups: dict[str, list[T]] = {}
    for row in rows:
        groups.setdefault(by(row), []).append(row)
    return groups


def kind_of(row: _Named) -> str:
    """See `starred`."""
    return starred(row.name)


def starred(name: str) -> str:
    """A tensor's name, a weight's without saying so, with the numbers of layers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name).removesuffix(".weight")


def layer_of(row: _Named) -> str:
    """The stack and the number of the layer that the tensor is in; a dash for what is in none."""
    place = place_of(row.name)
    return f"{place[0]} {place[1]}".lstrip() if place else "-"


def total_norm(rows: Iterable[Measured]) -> float:
    """The norm of all changes together."""
    return math.sqrt(sum(row.norm**2 for row in rows))


def total_relative(rows: Collection[Measured]) -> float | None:
    """The norm of all changes together, relative to that of what they change; None if a part of this is not known."""
    bases = [row.base for row in rows if row.base is not None]
    whole = math.sqrt(sum(base**2 for base in bases))
    return total_norm(rows) / whole if len(bases) == len(rows) and whole else None


def _origin(changes: Changes, name: str) -> tuple[str, int]:
    """How the tensor is changed, and how many numbers are trained for that."""
    updates = changes.updates
    if name in changes.own:
        site, value = changes.own[name]
        return type(updates.adapter.sites[site]).__name__, value.numel()
    trained = updates.trained[name].numel() if name in updates.trained else 0
    if name not in updates.of_deltas:
        return "new" if name in updates.new else "in place", trained
    site = updates.of_deltas[name]
    own = changes.parameters.get(site, {}).values() if name.endswith("weight") else ()
    return type(updates.adapter.sites[site]).__name__, trained + sum(value.numel() for value in own)


def _base_norm(changes: Changes, name: str) -> float | None:
    if name in changes.own or name in changes.updates.new:
        return None
    try:
        return float(changes.updates.before(name).norm())
    except UserError:  # quantized
        return None


def _own_parameters(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """By module, the trained tensors that a delta brought along; those that several share, with the first."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in adapter.parameters().items():
        site, mark, inner = f".{key}".rpartition(f".{CHILD}.{adapter.name}.")
        if mark:
            found.setdefault(site.lstrip("."), {})[inner] = value.detach()
    return found
