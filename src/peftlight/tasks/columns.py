"""A batch that lacks a column which a task reads is told by the column's name, whoever made it."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar

from peftlight.errors import UserError, listed

Step = TypeVar("Step", bound=Callable[..., Any])
_MADE_OF = (
    "A batch is a dict of tensors. Texts: input_ids and attention_mask (rows, tokens), and labels; images: "
    "pixel_values and labels; to predict: row, the numbers of the rows, in place of labels. See 'Data of your own' in "
    "the README."
)


def reads_columns(step: Step) -> Step:
    """A step of a task: what it misses in its batch is an error of the data.

    The step raises `UserError` where the batch is no mapping, or has no column that it reads.
    """

    @wraps(step)
    def reading(task: Any, batch: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(batch, Mapping):
            raise UserError(f"{_of(task)} gives a {type(batch).__name__} as a batch. {_MADE_OF}")
        try:
            return step(task, batch, *args, **options)
        except KeyError as error:
            (name,) = error.args or ("",)
            if not isinstance(name, str) or name in batch:
                raise
            raise UserError(
                f"{type(task).__name__} reads the column {name!r}, and a batch of {_of(task)} has "
                f"{listed(batch) or 'none'}. {_MADE_OF}"
            ) from error

    return reading  # type: ignore[return-value]


def _of(task: Any) -> str:
    data = task._datamodule()
    return "the data" if data is None else type(data).__name__
