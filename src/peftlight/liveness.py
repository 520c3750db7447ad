"""The audit of a training: what had a gradient, what moved, and whether the frozen base stayed as it was."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlight.errors import UserError, listed
from peftlight.strategy import Adapter

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1 << 22


@dataclass(frozen=True)
class Trained:
    """One trained tensor after a training."""

    name: str
    had_gradient: bool
    moved: bool


@dataclass(frozen=True)
class Verdict:
    """What became of every trained tensor, and the base's checksum."""

    trained: list[Trained]
    base_checksum: str

    @property
    def still(self) -> list[str]:
        """Names of the trained tensors that are where they started."""
        return [tensor.name for tensor in self.trained if not tensor.moved]

    def __str__(self) -> str:
        moved = f"{len(self.trained) - len(self.still)} of {len(self.trained)} trained tensors moved"
        left = f"; where they started: {listed(self.still)}" if self.still else ""
        return f"audit: {moved}, the frozen base is unchanged ({self.base_checksum}){left}"


class Liveness:
    """Watches one training of an adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._base = _checksums(self._frozen())
        self._start = _checksums(adapter.parameters().items())
        self._had_gradient: set[str] = set()

    def after_backward(self) -> None:
        """Look at the gradients before the first optimizer step.

        Raises:
            UserError: a trained tensor has none, so no training would ever move it.
        """
        if self._had_gradient:
            return
        self._had_gradient = {name for name, p in self.adapter.parameters().items() if p.grad is not None}
        dead = sorted(self._start.keys() - self._had_gradient)
        if dead:
            raise UserError(
                f"{len(dead)} of {len(self._start)} trained tensors had no gradient in the first step: {listed(dead)}. "
                "The loss does not depend on them, so they would never train. Leave their modules out (target_modules, "
                "exclude_modules, layers, trained_modules)."
            )

    def verdict(self) -> Verdict:
        """What the training did.

        Raises:
            UserError: a frozen tensor of the base has changed.
        """
        base = _checksums(self._frozen())
        changed = sorted(name for name, value in self._base.items() if base.get(name) != value)
        if changed:
            raise UserError(
                f"The frozen base changed while it was trained: {listed(changed)}. The adapter is not saved."
            )
        now = _checksums(self.adapter.parameters().items())
        trained = [Trained(name, name in self._had_gradient, now.get(name) != old) for name, old in self._start.items()]
        return Verdict(trained, hashlib.sha256(repr(sorted(base.items())).encode()).hexdigest()[:16])

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and the saved buffers that are not the adapter's."""
        model, own = self.adapter.model, self.adapter.state()
        saved = model.state_dict()
        for named in (model.named_parameters(), model.named_buffers()):
            for name, tensor in named:
                if name in saved and name not in own and not tensor.requires_grad:
                    yield name, tensor


def _checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Of each tensor one number from its bits; two that differ in one value have different ones."""
    sums = {name: _sum_of_bits(tensor.detach()) for name, tensor in tensors}
    return {name: int(total) for name, total in sums.items()}  # only now wait for the device


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Σ w (2 p + 1) modulo 2^64 over the positions p, where w are the value's bits as an integer.

    An odd factor has an inverse modulo 2^64, so no change of a single value leaves the sum as it was.
    """
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    words = local.contiguous().view(-1).view(_INTEGERS[local.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=local.device)
    for start in range(0, len(words), _PART):
        bits = words[start : start + _PART].to(torch.int64)
        positions = torch.arange(start, start + len(bits), device=bits.device)
        total += (bits * (2 * positions + 1)).sum()
    return total
