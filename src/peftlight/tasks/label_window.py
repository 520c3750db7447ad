"""The loss over all micro-batches of one optimizer step, on all processes, divided by all their labels."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


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

    def add(self, loss_sum: Tensor, labels: Tensor) -> Tensor:
        """Take one micro-batch in; returns what to differentiate, without the trainer's own averaging factors."""
        totals = torch.stack([loss_sum.detach().float(), labels.float()])
        if self._batches == 0:
            self._first = self._sum(totals[1].clone()).clamp(min=1)
            self._totals = torch.zeros_like(totals)
        self._totals = self._totals + totals
        self._batches += 1
        return loss_sum / self._first

    def close(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """End the window: scale the gradients, and return the mean loss per label over all processes."""
        loss, labels = self._sum(self._totals)
        if self._batches > 1:
            factor = self._first / labels.clamp(min=1)
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)
        self._batches = 0
        return loss / labels.clamp(min=1)
