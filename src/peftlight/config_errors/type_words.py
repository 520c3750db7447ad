"""Types in words."""

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    dict: "keys with values",
}
_COLLECTIONS = {"dict": "keys with values", "Mapping": "keys with values", "type": "a class path"}


def described(annotation: Any) -> str:
    """What a value of this type is."""
    among, words = choices(annotation), list(dict.fromkeys(_described(annotation)))
    if _WORDS[float] in words and _WORDS[int] in words:
        words.remove(_WORDS[int])
    if _WORDS[str] in words:
        words = [word for word in words if not word.startswith("a class path")]
    return " or ".join([*([f"one of {', '.join(among)}"] if among else []), *words])


def choices(annotation: Any) -> list[str]:
    """The values among which `annotation` leaves the choice."""
    if typing.get_origin(annotation) is Literal:
        return [str(value) for value in typing.get_args(annotation)]
    return list(dict.fromkeys(choice for inner in typing.get_args(annotation) for choice in choices(inner)))


def item(annotation: Any) -> Any:
    """The type of what stands in a list or under a key; None if there is no such thing."""
    inner = typing.get_args(annotation)
    if is_union(annotation):
        return next((found for one in inner if (found := item(one)) is not None), None)
    return inner[-1] if inner and typing.get_origin(annotation) is not Literal else None


def is_union(annotation: Any) -> bool:
    """Whether `annotation` is X | Y, or the older Union[X, Y]."""
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def _described(annotation: Any) -> Iterator[str]:
    origin = typing.get_origin(annotation)
    if isinstance(annotation, type) and annotation in _WORDS:
        yield _WORDS[annotation]
    elif is_union(annotation):
        for inner in typing.get_args(annotation):
            yield from _described(inner)
    elif origin is not None and origin is not Literal:
        yield _COLLECTIONS.get(getattr(origin, "__name__", ""), "a list")
    elif isinstance(annotation, type) and annotation is not Tensor:
        yield f"a class path ({annotation.__name__})"
