"""What tasks share whose loss is a cross-entropy: its sum over the labels, and its mean over a whole evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

IGNORED = -100
"""The label of what is neither trained nor scored."""


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (..., classes) summed over the labels (...), and their count."""
    loss_sum = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, (labels != IGNORED).sum()


class TokenLosses(nn.ModuleDict):
    """The mean loss per label of each evaluation stage ("val" or "test"), over all batches and processes."""

    def __init__(self) -> None:
        super().__init__({f"{stage}_mean": MeanMetric() for stage in ("val", "test")})

    def add(self, stage: str, loss_sum: Tensor, labels: Tensor) -> None:
        """Count in a batch's summed loss over that many labels."""
        self._mean(stage).update(loss_sum / labels.clamp(min=1), weight=labels)

    def take(self, stage: str) -> dict[str, Tensor]:
        """The stage's loss and perplexity; start over."""
        loss = self.take_mean(stage)
        return {f"{stage}_loss": loss, f"{stage}_perplexity": torch.exp(loss)}

    def take_mean(self, stage: str) -> Tensor:
        """The stage's loss; start over."""
        mean = self._mean(stage)
        loss: Tensor = mean.compute()
        mean.reset()
        return loss

    def _mean(self, stage: str) -> MeanMetric:
        mean = self[f"{stage}_mean"]
        assert isinstance(mean, MeanMetric)
        return mean
