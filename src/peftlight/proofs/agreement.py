"""Whether two collections of values are the same, and where they first differ."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Leaves = dict[str, Any]
"""Tensors and plain values by the path at which they stand."""


@dataclass(frozen=True)
class Outcome:
    """What a proof found."""

    holds: bool
    text: str
    """What was compared and came out equal; or what differs first."""


@dataclass(frozen=True)
class Gap:
    """One tensor or plain value that is not the same on both sides."""

    name: str
    ours: str
    """On the first side; of a tensor the number that is furthest off."""
    theirs: str
    numbers: str = ""
    """Of a tensor: how many numbers differ, and how far."""

    def told(self, first: str, second: str) -> str:
        """One sentence, in which the two sides are called by these names."""
        return f"{self.name}: {self.numbers}{self.ours} {first}, {self.theirs} {second}"


def leaves(value: Any, path: str = "") -> Leaves:
    """All that is in nested mappings and sequences, in their order."""
    return dict(_walk(value, path))


def first_gap(one: Leaves, other: Leaves, limit: float = 0.0) -> Gap | None:
    """The first entry in which the two differ, numbers in tensors by more than `limit`; None where there is none."""
    for name in [*one, *(name for name in other if name not in one)]:
        if name not in one or name not in other:
            return Gap(name, "there" if name in one else "missing", "there" if name in other else "missing")
        gap = _gap(name, one[name], other[name], limit)
        if gap is not None:
            return gap
    return None


def largest_gap(one: Leaves, other: Leaves) -> float:
    """The largest difference of two numbers in tensors of the same name and shape; 0.0 where there is none."""
    pairs = [(value, other[name]) for name, value in one.items() if isinstance(value, Tensor) and value.numel()]
    return max((float(_distance(a, b).max()) for a, b in pairs), default=0.0)


def count(found: Leaves) -> str:
    """How many tensors there are, with how many numbers."""
    tensors = [value for value in found.values() if isinstance(value, Tensor)]
    return f"{len(tensors):,} tensors of {sum(tensor.numel() for tensor in tensors):,} numbers"


def _walk(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from _walk(item, f"{path}.{key}" if path else str(key))


def _gap(name: str, one: Any, other: Any, limit: float) -> Gap | None:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        same = one == other or (one != one and other != other)  # a NaN is the same as another
        return None if same else Gap(name, repr(one), repr(other))
    if one.shape != other.shape or one.dtype != other.dtype:
        return Gap(name, _kind(one), _kind(other))
    distance = _distance(one, other)
    wrong = int((distance > limit).sum())
    if not wrong:
        return None
    at = int(distance.argmax())
    figures = f"{wrong:,} of {one.numel():,} numbers differ, by {float(distance.max()):.3g} at most: "
    return Gap(name, repr(one.reshape(-1)[at].item()), repr(other.reshape(-1)[at].item()), figures)


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """|a - b| in float64, flat; 0 where both are the same, NaN and infinity included, and else infinite there."""
    a, b = (each.detach().cpu().reshape(-1).double() for each in (one, other))
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
