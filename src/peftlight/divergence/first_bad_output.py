"""Which module's output is the first that is not finite."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from peftlight.finite import largest


@dataclass
class Outputs:
    """What was seen of the modules' outputs, in the order in which they were computed."""

    largest: float = 0.0
    """The largest absolute value while all were finite."""
    largest_of: str = ""
    """The module that gave it."""
    first_bad: str = ""
    """The first module whose output is not finite; empty: all were."""
    dtype: str = ""
    """The number format of that output."""

    def __str__(self) -> str:
        if not self.first_bad:
            return "All modules gave finite numbers; the loss computed from them is not finite."
        before = f"; the largest before it was {self.largest:.2g}, from {self.largest_of}" if self.largest else ""
        return f"The first numbers that are not finite came out of {self.first_bad}, in {self.dtype}{before}."


@contextmanager
def watched(model: nn.Module) -> Iterator[Outputs]:
    """Look at what the modules give out within the block. Each waits for the device."""
    names, seen = {module: name or "the model" for name, module in model.named_modules()}, Outputs()

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in names and not seen.first_bad:
            _note(seen, names[module], [leaf for leaf in tree_leaves(output) if _has_fractions(leaf)])

    hook = register_module_forward_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def _note(seen: Outputs, name: str, outputs: list[Tensor]) -> None:
    if not outputs:
        return
    value = float(largest([output.detach() for output in outputs], outputs[0].device))
    if not math.isfinite(value):
        seen.first_bad, seen.dtype = name, str(outputs[0].dtype).removeprefix("torch.")
    elif value > seen.largest:
        seen.largest, seen.largest_of = value, name


def _has_fractions(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
