"""A task made again from a checkpoint, which may come from anyone: what it says is data, and names no code to run."""

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod
from torch import Tensor

from peftlight.checkpoint_files import read_checkpoint
from peftlight.errors import UserError, listed
from peftlight.typed import fits, kind_of

Task = TypeVar("Task", bound="FromCheckpoint")
_STRATEGY = "strategy"
"""The one hyperparameter that names a class, which is found among those that are imported already."""
_PLAIN = (str, int, float, bool, type(None), Tensor)


class FromCheckpoint(LightningModule):
    """Reads checkpoints in Lightning's place, which lets them name the class, its arguments' classes and a function."""

    @_restricted_classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls: type[Task],
        checkpoint_path: str | Path,
        map_location: str | torch.device | None = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Task:
        """The task with the checkpoint's hyperparameters and weights.

        Args:
            checkpoint_path: the checkpoint's file.
            map_location: the device on which the task is put; none: the CPU.
            hparams_file: cannot be given; the arguments themselves can.
            strict: has no effect: what is trained has to be there, and nothing else.
            weights_only: cannot be false.
            kwargs: arguments of the class that replace the checkpoint's hyperparameters.

        Raises:
            UserError: there is no such checkpoint, its weights do not fit, or reading it could run code.
        """
        if hparams_file is not None:
            raise UserError("hparams_file is not read: give the arguments themselves, load_from_checkpoint(path, ...).")
        if weights_only is False:
            raise UserError(f"weights_only is false, so the checkpoint {checkpoint_path} could run code: leave it out.")
        content = read_checkpoint(checkpoint_path)
        module = cls(**_arguments(cls, content.get("hyper_parameters", {}), kwargs, checkpoint_path))
        module.configure_model()
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
        return module.to(map_location or "cpu")


def _arguments(task: type, found: Any, given: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What the class is called with; hyperparameters that it has no argument for are notes of a task's own."""
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise UserError(f"The checkpoint {path} is refused: its hyper_parameters are not names with values.")
    hints = _hints(task)
    for name in (name for name in found if name not in given):
        if wrong := _wrong(name, found[name], hints, given):
            raise UserError(f"The checkpoint {path} is refused: among its hyperparameters {name} {wrong}")
    if missing := sorted({"base_model", _STRATEGY} - {*found, *given}):
        raise UserError(f"The checkpoint {path} does not say its {listed(missing)}: it was not written by peftlight. "
                        f"Give them: {_call(*missing)}")  # fmt: skip
    parameters = inspect.signature(task.__init__).parameters  # type: ignore[misc]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return {**{name: value for name, value in found.items() if takes_all or name in parameters}, **given}


def _wrong(name: str, value: Any, hints: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What is wrong with a hyperparameter, and what to do; empty if nothing is."""
    if name.startswith("_"):
        return (f"is {value!r}, by which LightningCLI names code to run. It writes this for a task that calls "
                "save_hyperparameters() without names: give them, as in save_hyperparameters('margin').")  # fmt: skip
    if name == "trust_remote_code" and value and isinstance(given.get("base_model", ""), str):
        return ("is true, so Python code that comes with the base would run with your rights. Read it, and if you "
                "trust it: load_from_checkpoint(path, trust_remote_code=True)")  # fmt: skip
    if name == _STRATEGY:
        return "" if isinstance(value, Mapping) and {"class_path", "init_args"} <= value.keys() else "is no strategy."
    if strange := _strange(value):
        return f"{strange}; expected plain values. Give it yourself: {_call(name)}"
    if name in hints and not fits(value, hints[name]):
        return f"is {value!r}; expected {kind_of(hints[name])}."
    return ""


def _strange(value: Any) -> str:
    """What of a value names a class or is not plain data; empty if nothing is."""
    if isinstance(value, Mapping) and "class_path" in value:
        return f"names the class {value['class_path']}"
    inner = [*value, *value.values()] if isinstance(value, Mapping) else value
    if isinstance(inner, list | tuple):
        return next(filter(None, map(_strange, inner)), "")
    return "" if isinstance(value, _PLAIN) else f"holds a {type(value).__name__}"


def _call(*names: str) -> str:
    return f"load_from_checkpoint(path, {', '.join(f'{name}=...' for name in names)})"


def _hints(task: type) -> dict[str, Any]:
    """The kinds of all arguments, those that a class hands on to its parents included."""
    hints: dict[str, Any] = {}
    for kind in reversed(task.__mro__):
        if kind.__module__ != "builtins" and "__init__" in vars(kind):
            with contextlib.suppress(NameError):  # a hint of the user's that names what stands inside a function
                hints |= get_type_hints(kind.__init__)  # type: ignore[misc]
    return hints
