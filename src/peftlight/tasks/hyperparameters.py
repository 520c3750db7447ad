"""What a checkpoint holds of a task's options, so that `load_from_checkpoint` makes the same task again."""

from collections.abc import Mapping
from types import FrameType
from typing import Any

_NOT_KEPT = ("optimizer", "lr_scheduler")
"""Functions; the optimizer's state is in the checkpoint, and its options are in that."""


def own_options(module: object, frame: FrameType | None) -> dict[str, Any]:
    """The options that a class of the user's has beyond ours, as they were given.

    Args:
        module: the task that is being made.
        frame: of our `__init__`, which the user's calls.
    """
    found: dict[str, Any] = {}
    while frame is not None and _makes(module, frame):
        if not str(frame.f_globals.get("__name__")).startswith("peftlight."):
            code = frame.f_code
            names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
            found = {name: frame.f_locals[name] for name in names if name in frame.f_locals} | found
        frame = frame.f_back
    return {name: value for name, value in found.items() if is_plain(value)}


def kept_options(given: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of all that was recorded, by a `save_hyperparameters` of the user's too.

    Args:
        given: all that was recorded.
        ours: what every task has, as plain values.
    """
    return {**{name: value for name, value in given.items() if name not in _NOT_KEPT}, **ours}


def is_plain(value: Any) -> bool:
    """Whether a checkpoint can hold the value, and give it back without running code."""
    if isinstance(value, list | tuple):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(one) for key, one in value.items())
    return value is None or type(value) in (bool, int, float, str)


def _makes(module: object, frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "__init__" and code.co_argcount > 0 and frame.f_locals.get(code.co_varnames[0]) is module
