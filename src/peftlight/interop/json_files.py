"""JSON as adapters' files hold it: the same text for the same value, and read with distrust."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peftlight.errors import UserError

_DEEPEST = 50
"""Levels of lists and objects within each other; ours have five."""
_LARGEST = 2**63 - 1
_LONGEST = 1 << 24
"""Bytes of a file; the config of a large model that names each of its layers has a hundredth of it."""


def as_json(value: Mapping[str, Any]) -> str:
    """The value as text, the same for the same value.

    Raises:
        UserError: it holds something that JSON cannot.
    """
    try:
        return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The strategy's or the record's fields cannot be saved: {error}. Use finite numbers, text, lists and "
            "dicts."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, whose numbers are finite and fit into 64 bits.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        if path.stat().st_size > _LONGEST:
            raise UserError(f"{path.name} has {path.stat().st_size} bytes; expected at most {_LONGEST}.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} holds a {type(value).__name__}; expected a JSON object.")
    for where, number in _numbers(value, "", path.name, 0):
        if abs(number) > _LARGEST if isinstance(number, int) else not math.isfinite(number):
            raise UserError(f"{path.name}: {where} is {_shown(number)}; expected a finite number of at most 64 bits.")
    return value


def _numbers(value: Any, where: str, file: str, depth: int) -> Iterator[tuple[str, float]]:
    if depth > _DEEPEST:
        raise UserError(f"{file} nests lists and objects {depth} deep; expected at most {_DEEPEST}.")
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(item, f"{where}.{key}".lstrip("."), file, depth + 1)
    elif isinstance(value, int | float):
        yield where, value


def _shown(number: float) -> str:
    return f"of {number.bit_length()} bits" if isinstance(number, int) else str(number)
