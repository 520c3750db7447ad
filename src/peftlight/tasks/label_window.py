"""The loss over all micro-batches of one optimizer step, on all processes, divided by all their labels."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlight.shards import local


class Closed(NamedTuple):
    """A window that has ended, over all processes."""

    loss: Tensor
    """The mean per label."""
    labels: Tensor
    """How many there were."""
    factor: Tensor
    """By which the gradients were scaled."""
    beside: list[Tensor]
    """The sums of the numbers given beside."""


class LabelWindow:
    """Makes the gradient that of (sum of all label losses) / (number of all labels) in the global batch.

    Averaging the means of micro-batches, as trainers do, gives labels of short rows more weight. Here each
    micro-batch contributes its summed loss, divided by the label count n₁ of the window's first micro-batch; before
    the optimizer step the gradients are multiplied by n₁ / N, with N the count of the whole window.
    """

    def __init__(self, sum_over_processes: Callable[[Tensor], Tensor]) -> None:
        self._sum = sum_over_processes
        self._batches = 0
        self._totals = self._first = torch.zeros(())

    def start(self) -> None:
        """Forget a window that was broken off."""
        self._batches = 0

    @property
    def is_open(self) -> bool:
        """Whether it has a micro-batch."""
        return self._batches > 0

    def state(self) -> dict[str, Any] | None:
        """What an open window has of this process, as plain values and tensors; None between two windows."""
        if not self.is_open:
            return None
        return {"batches": self._batches, "totals": self._totals.cpu(), "first": self._first.cpu()}

    def reopen(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on with an open window."""
        self._batches = state["batches"]
        self._totals, self._first = state["totals"].to(device), state["first"].to(device)

    def add(self, loss_sum: Tensor, labels: Tensor) -> Tensor:
        """Take one micro-batch in; returns what to differentiate, without the trainer's own averaging factors."""
        totals = torch.stack([loss_sum.detach().float(), labels.float()])
        if not self.is_open:
            self._first = self._sum(totals[1].clone()).clamp(min=1)
            self._totals = torch.zeros_like(totals)
        self._totals = self._totals + totals
        self._batches += 1
        return loss_sum / self._first

    def close(self, parameters: Iterable[nn.Parameter], beside: Tensor) -> Closed:
        """End the window, and scale the gradients.

        Args:
            parameters: whose gradients are scaled.
            beside: (n,) other numbers of this process, to be summed over all on the same occasion.
        """
        totals = self._totals if self.is_open else beside.new_zeros(2)  # a training_step may leave a batch out
        loss, labels, *others = self._sum(torch.cat([totals, beside]))
        factor = self._first / labels.clamp(min=1)
        if self._batches > 1:
            torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], factor)
        self._batches = 0
        return Closed(loss / labels.clamp(min=1), labels, factor, others)
