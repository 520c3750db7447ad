"""Strategies as plain data, for checkpoints and adapters: {"class_path": ..., "init_args": {...}}."""

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any, TypedDict, get_origin, get_type_hints

from peftlight.class_paths import below, found, path_of, unknown
from peftlight.errors import UserError, listed
from peftlight.strategy import PEFTStrategy
from peftlight.typed import fits, kind_of


class StrategySpec(TypedDict):
    """A strategy's class and its hyperparameters."""

    class_path: str
    init_args: dict[str, Any]


def spec_of(strategy: PEFTStrategy) -> StrategySpec:
    """The strategy as plain data.

    Raises:
        UserError: its fields do not say all of it, or one holds what a file cannot.
    """
    kind = type(strategy)
    _check_fields(kind)
    arguments = {name: _plain(getattr(strategy, name), f"{kind.__name__}.{name}") for name in _fields(kind)}
    return {"class_path": path_of(kind), "init_args": arguments}


def kinds_in(strategy: PEFTStrategy) -> list[type]:
    """The classes of a strategy and of those within it."""
    values: list[Any] = [strategy, *vars(strategy).values()]
    each = [item for value in values for item in (value if isinstance(value, list) else [value])]
    inner = [kind for one in each[1:] if isinstance(one, PEFTStrategy) for kind in kinds_in(one)]
    return list(dict.fromkeys([type(strategy), *inner]))


def _fields(kind: type) -> list[str]:
    return [one.name for one in dataclasses.fields(kind) if one.init] if dataclasses.is_dataclass(kind) else []


def _check_fields(kind: type) -> None:
    """See that a strategy of that class can be made again from its fields."""
    fields, parameters = _fields(kind), inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
    named = [one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)][1:]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    lost = [name for name in (*named, *_hinted_alone(kind)) if name not in fields]
    if lost := lost or ([] if takes_all else [name for name in fields if name not in named]):
        raise UserError(
            f"A file could not hold all of the strategy {kind.__name__}: {listed(lost)}. Its hyperparameters are the "
            "fields of a dataclass: put @dataclass above the class, declare each as `name: type = default`, and write "
            "no __init__; what is computed from them goes into __post_init__."
        )


def _hinted_alone(kind: type) -> list[str]:
    """What looks like a field, in a class without the decorator that makes it one."""
    parents = kind.__mro__[: kind.__mro__.index(PEFTStrategy)]
    hints = [pair for one in parents if "__dataclass_fields__" not in vars(one)
             for pair in inspect.get_annotations(one).items()]  # fmt: skip
    of_all = inspect.get_annotations(PEFTStrategy)
    return [name for name, hint in hints if name not in of_all and "ClassVar" not in str(hint)]


def _plain(value: Any, where: str) -> Any:
    """A copy of a field's value, with strategies in it as plain data."""
    if isinstance(value, PEFTStrategy):
        return spec_of(value)
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, dict) and all(type(key) is str for key in value):
        return {key: _plain(item, where) for key, item in value.items()}
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise UserError(
        f"{where} is {value!r} (a {type(value).__name__}), which a file cannot hold. A strategy's fields are finite "
        "numbers, text, true or false, None, lists, dicts with text as keys, and strategies."
    )


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
    hints = _hints(kind)
    _check_kinds(hints, path, arguments)
    arguments = {name: tuple(value) if isinstance(value, list) and get_origin(hints.get(name)) is tuple else value
                 for name, value in arguments.items()}  # fmt: skip
    try:
        return kind(**arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"The strategy {path} does not take what was saved: {error}") from error


def _hints(kind: type[PEFTStrategy]) -> dict[str, Any]:
    try:
        return get_type_hints(kind)
    except NameError:  # hints that name what stands inside a function, in a strategy of the user's
        return {}


def _check_kinds(hints: Mapping[str, Any], path: str, arguments: Mapping[str, Any]) -> None:
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
