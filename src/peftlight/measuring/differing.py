"""How far two adapters of one base are apart, tensor by tensor."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from peftlight.interop import Record
from peftlight.matrices import Matrix, cosines, inner_product, weighted_sum
from peftlight.measuring.measured import Changes
from peftlight.strategy import Adapter


@dataclass(frozen=True)
class Subspaces:
    """The spaces of the strongest directions of two updates, i of one and j of the other."""

    degrees: list[float]
    """The principal angles between them, smallest first."""
    similarity: float
    """φ = ‖UᵢᵀU'ⱼ‖² / min(i, j), the mean squared cosine: 1 where one holds the other, 0 where they are orthogonal.

    Equation 4 of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    https://arxiv.org/abs/2106.09685
    """
    by_chance: float
    """φ of two such spaces that are drawn at random, on average: max(i, j) / dimension."""


@dataclass(frozen=True)
class Difference:
    """Two changes ΔW and ΔW' of one tensor."""

    name: str
    norms: tuple[float, float]
    cosine: float | None
    """⟨ΔW, ΔW'⟩ / (‖ΔW‖ ‖ΔW'‖); None where one is zero."""
    distance: float | None
    """‖ΔW - ΔW'‖ / √((‖ΔW‖² + ‖ΔW'‖²) / 2): 0 for the same, √2 for orthogonal ones, 2 for opposite ones."""
    outputs: Subspaces | None
    """Of the column spaces, in which the layer's outputs change; None for vectors."""
    inputs: Subspaces | None
    """Of the row spaces, the inputs that the change reads."""


@dataclass(frozen=True)
class Differences:
    """Two adapters compared."""

    common: list[Difference]
    only: tuple[list[str], list[str]]
    """Tensors that only the first, or only the second changes; those of other shapes in both."""


def differences(one: Adapter, two: Adapter, new: Sequence[str], directions: int) -> Differences:
    """Compare the changes of two adapters on one model, both off.

    Args:
        one: an adapter.
        two: the other.
        new: tensors that the base's files do not hold.
        directions: most directions of an update that count for its subspace.
    """
    first, second = Changes(one, new), Changes(two, new)
    common, apart = [], []
    for name in [name for name in first if name in second]:
        here, there = first[name], second[name]
        if here.shape == there.shape:
            common.append(_difference(name, here, there, directions))
        else:
            apart.append(name)
    only = [[name for name in these if name not in others or name in apart]
            for these, others in ((first, second), (second, first))]  # fmt: skip
    return Differences(common, (only[0], only[1]))


def differing_settings(one: tuple[Adapter, Record], two: tuple[Adapter, Record]) -> Iterator[tuple[str, Any, Any]]:
    """Name and both values of what the two were not trained alike with."""
    first, second = _settings(*one), _settings(*two)
    for name in dict.fromkeys([*first, *second]):
        if first.get(name) != second.get(name):
            yield name, first.get(name), second.get(name)


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _difference(name: str, here: Matrix, there: Matrix, directions: int) -> Difference:
    norms = here.norm(), there.norm()
    size = math.sqrt((norms[0] ** 2 + norms[1] ** 2) / 2)
    matrices = min(here.shape) > 1 and all(norms)
    i, j = (min(directions, change.rank) if matrices else 0 for change in (here, there))
    return Difference(
        name,
        norms,
        inner_product(here, there) / (norms[0] * norms[1]) if all(norms) else None,
        weighted_sum([here, there], [1.0, -1.0]).norm() / size if size else None,
        _subspaces(here.svd.U[:, :i], there.svd.U[:, :j]) if matrices else None,
        _subspaces(here.svd.V[:, :i], there.svd.V[:, :j]) if matrices else None,
    )


def _subspaces(one: Any, two: Any) -> Subspaces:
    found, (dimension, i), j = cosines(one, two), one.shape, two.shape[1]
    chance = max(i, j) / dimension
    return Subspaces(found.acos().rad2deg().tolist(), float(found.square().mean()), chance)


def _settings(adapter: Adapter, record: Record) -> dict[str, Any]:
    strategy = adapter.strategy
    fields: dict[str, Any] = dataclasses.asdict(strategy) if dataclasses.is_dataclass(strategy) else {}
    data = record.data or {}
    return {
        "method": type(strategy).__name__,
        **fields,
        "trained in place": adapter.trained or None,
        "base revision": record.base.revision,
        "task": record.task,
        "classes": record.label_names,
        "data source": data.get("source"),
        "data fingerprint": data.get("fingerprint"),
        "steps": record.steps,
        "seed": record.seed,
        "metrics": record.metrics,
    }
