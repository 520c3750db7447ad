"""Strategies as plain data, for checkpoints and adapters: {"class_path": ..., "init_args": {...}}."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

from peftlight.errors import UserError, listed, nearest
from peftlight.strategy import PEFTStrategy


class StrategySpec(TypedDict):
    """A strategy's class and its hyperparameters."""

    class_path: str
    init_args: dict[str, Any]


def spec_of(strategy: PEFTStrategy) -> StrategySpec:
    """The strategy as plain data."""
    kind = type(strategy)
    arguments: dict[str, Any] = dataclasses.asdict(strategy) if dataclasses.is_dataclass(strategy) else {}
    return {"class_path": f"{kind.__module__}.{kind.__qualname__}", "init_args": arguments}


def as_strategy(given: PEFTStrategy | Mapping[str, Any]) -> PEFTStrategy:
    """A strategy from plain data; a strategy is returned as it is.

    Only classes that are already imported are found: a file cannot name code to run.

    Raises:
        UserError: there is no such class, or it does not take these arguments.
    """
    if isinstance(given, PEFTStrategy):
        return given
    import peftlight.strategies  # noqa: F401  # so that ours are among the subclasses

    path = str(given["class_path"])
    known = {f"{kind.__module__}.{kind.__qualname__}": kind for kind in _subclasses(PEFTStrategy)}
    if path not in known:
        raise UserError(
            f"The strategy {path} is not known.{nearest(path, known)} "
            f"If it is yours, import its module first. Known: {listed(sorted(known))}."
        )
    try:
        return known[path](**given["init_args"])
    except TypeError as error:
        raise UserError(f"The strategy {path} does not take what was saved: {error}") from error


def _subclasses(kind: type[PEFTStrategy]) -> Iterator[type[PEFTStrategy]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
