"""Whether numbers are finite: neither NaN nor infinite."""

from collections.abc import Iterable

import torch
from torch import Tensor

from peftlight.shards import local


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; of a sharded one, this process's part is looked at."""
    return [name for name, tensor in tensors if not _is_finite(local(tensor.detach()))]


def largest(tensors: Iterable[Tensor], device: torch.device) -> Tensor:
    """The largest absolute value in all of them, as a scalar that stays on the device; NaN if there is one, else inf.

    Unlike a norm it neither overflows nor vanishes while its values do not.
    """
    parts = [part for part in map(local, tensors) if part.numel()]
    if not parts:
        return torch.zeros((), device=device)
    return torch.stack([norm.float() for norm in torch._foreach_norm(parts, torch.inf)]).max()


def _is_finite(value: Tensor) -> bool:
    if value.is_floating_point() and value.element_size() == 1:
        value = value.float()  # torch cannot tell it of eight-bit numbers
    return bool(value.isfinite().all())
