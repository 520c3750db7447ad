"""Values of the Trainer that Lightning lets pass, and with which a training fails later or does something else."""

from collections.abc import Mapping, Sequence
from typing import Any

from peftlight.config_errors.given import find, read_given
from peftlight.errors import UserError

_LEAST = {"accumulate_grad_batches": 1, "gradient_clip_val": 0}  # a negative clip turns the gradients around
_TRAINS_NOTHING = ("max_epochs", "max_steps", "limit_train_batches")


def check_limits(arguments: Sequence[str], trainer: Mapping[str, Any]) -> None:
    """See that the trainer's values, which come of `arguments`, a command and its options, can be used.

    Raises:
        UserError: one cannot.
    """
    for name, least in _LEAST.items():
        value = trainer.get(name)
        if value is not None and value < least:
            raise UserError(f"{_place(arguments, name)}{name} must be at least {least}; it is {value}.")
    for name in _TRAINS_NOTHING if arguments[0] == "fit" else ():
        if trainer.get(name) == 0:
            raise UserError(f"{_place(arguments, name)}with {name} 0 nothing would be trained.")


def _place(arguments: Sequence[str], name: str) -> str:
    found = find(read_given(arguments), ("trainer", name))
    return f"{found.where}: " if found else ""
