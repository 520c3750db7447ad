"""What an optimizer step is judged by."""

import math
from dataclasses import dataclass
from typing import Literal

Failure = Literal["loss", "gradient", "skipped", "penalty", "no labels", "no loss", "no gradient"]
"""What is not finite, or what is exactly nothing; skipped: the gradient scaler found no scale that works."""


@dataclass(frozen=True)
class Step:
    """An optimizer step that has not been taken yet, over all micro-batches and processes."""

    number: int
    """From 1."""
    rate: float
    """The learning rate."""
    loss: float
    """The mean per label."""
    labels: float
    gradient: float
    """The largest absolute value in the gradient of the loss, in all trained tensors; of shards, the mean of theirs."""
    penalty: float
    """The largest absolute value in the gradient of the strategy's penalty."""

    def idle(self) -> Failure | None:
        """What there is nothing of; None where the step may teach something."""
        if not self.labels:
            return "no labels"
        if not self.loss:
            return "no loss"
        return "no gradient" if not self.gradient and not self.penalty else None

    def not_finite(self) -> Failure | None:
        """What is not a finite number."""
        numbers: dict[Failure, float] = {"loss": self.loss, "penalty": self.penalty, "gradient": self.gradient}
        return next((name for name, value in numbers.items() if not math.isfinite(value)), None)
