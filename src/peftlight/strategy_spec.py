"""Strategies as plain data, for checkpoints and adapters: {"class_path": ..., "init_args": {...}}."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, TypedDict, get_type_hints

from peftlight.class_paths import below, found, path_of, unknown
from peftlight.errors import UserError
from peftlight.strategy import PEFTStrategy
from peftlight.typed import fits, kind_of


class StrategySpec(TypedDict):
    """A strategy's class and its hyperparameters."""

    class_path: str
    init_args: dict[str, Any]


def spec_of(strategy: PEFTStrategy) -> StrategySpec:
    """The strategy as plain data."""
    kind = type(strategy)
    names: list[str] = (
        [field.name for field in dataclasses.fields(strategy)] if dataclasses.is_dataclass(strategy) else []
    )
    arguments = {name: _plain(getattr(strategy, name)) for name in names}
    return {"class_path": path_of(kind), "init_args": arguments}


def kinds_in(strategy: PEFTStrategy) -> list[type]:
    """The classes of a strategy and of those within it."""
    values: list[Any] = [strategy, *vars(strategy).values()]
    each = [item for value in values for item in (value if isinstance(value, list) else [value])]
    inner = [kind for one in each[1:] if isinstance(one, PEFTStrategy) for kind in kinds_in(one)]
    return list(dict.fromkeys([type(strategy), *inner]))


def _plain(value: Any) -> Any:
    """A copy of a field's value, with strategies in it as plain data."""
    if isinstance(value, PEFTStrategy):
        return spec_of(value)
    return [_plain(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)


def as_strategy(given: PEFTStrategy | Mapping[str, Any]) -> PEFTStrategy:
    """A strategy from plain data; a strategy is returned as it is.

    Only classes that are already imported are found: a file cannot name code to run. Ours are found by name alone too.

    Raises:
        UserError: there is no such class, or it does not take these arguments.
    """
    if isinstance(given, PEFTStrategy):
        return given
    import peftlight.strategies  # noqa: F401  # so that ours are among the subclasses

    path = str(given["class_path"])
    ours = {kind.__name__: kind for kind in below(PEFTStrategy) if kind.__module__.startswith("peftlight.strategies.")}
    kind = found(path, PEFTStrategy) or ours.get(path)
    if kind is None:
        raise unknown("strategy", path, PEFTStrategy)
    arguments = {name: _made(value) for name, value in given["init_args"].items()}
    _check_kinds(kind, path, arguments)
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"The strategy {path} does not take what was saved: {error}") from error


def _check_kinds(kind: type[PEFTStrategy], path: str, arguments: Mapping[str, Any]) -> None:
    try:
        hints = get_type_hints(kind)
    except NameError:  # hints that name what stands inside a function, in a strategy of the user's
        return
    for name, value in arguments.items():
        if name in hints and not fits(value, hints[name]):
            raise UserError(
                f"The strategy {path} does not take what was saved: {name} is {value!r}; expected "
                f"{kind_of(hints[name])}."
            )


def _made(value: Any) -> Any:
    """A field's value, with strategies made from their plain data."""
    if (
        isinstance(value, Mapping)
        and value.keys() == {"class_path", "init_args"}
        and isinstance(value["init_args"], Mapping)
    ):
        return as_strategy(value)
    return [_made(item) for item in value] if isinstance(value, list) else value
