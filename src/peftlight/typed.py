"""Whether plain data, as JSON and YAML hold it, is of the kind that a type hint asks for."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

_PLAIN = (str, bool, NoneType, list, dict)


def fits(value: object, hint: Any) -> bool:
    """Whether `value` is of the hint's kind; a hint that is not about plain data takes everything.

    Of a `Literal`, the kind alone counts: which words there are is better said by who reads them.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return any(fits(value, type(word)) for word in inner)
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if is_typeddict(hint):
        return isinstance(value, dict) and _has_keys(value, hint)
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return hint not in _PLAIN or isinstance(value, hint)


def _has_keys(value: dict[Any, Any], hint: Any) -> bool:
    """Whether the keys are there that must be, with values of their kinds; there may be others."""
    return hint.__required_keys__ <= value.keys() and misfit(value, hint) is None


def misfit(values: Mapping[Any, Any], kind: Any) -> tuple[str, str] | None:
    """The first field of `kind`, a class with hints, whose value is of another kind, and the hint in words.

    Only the fields that are there are looked at; None: all of them fit.
    """
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name in values}
    return next(((name, kind_of(hint)) for name, hint in hints.items() if not fits(values[name], hint)), None)


def kind_of(hint: Any) -> str:
    """The hint as a person reads it."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join("None" if one is NoneType else kind_of(one) for one in get_args(hint))
    if is_typeddict(hint):
        return f"an object with {', '.join(sorted(get_type_hints(hint)))}"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
