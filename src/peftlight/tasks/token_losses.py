"""What tasks share whose loss is a cross-entropy: its sum over the labels, and its mean over a whole evaluation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

IGNORED = -100
"""The label of what is neither trained nor scored."""


def token_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (..., classes) summed over the labels (...), and their count."""
    loss_sum = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss_sum, (labels != IGNORED).sum()


class MeanPerLabel(Metric):
    """The summed loss of all batches and processes over the number of their labels; NaN if there is none."""

    loss: Tensor
    labels: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("loss", "labels"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, loss_sum: Tensor, labels: Tensor) -> None:
        """Count in a batch's summed loss over that many labels."""
        self.loss = self.loss + loss_sum
        self.labels = self.labels + labels

    def compute(self) -> Tensor:
        return self.loss / self.labels


class TokenLosses(nn.ModuleDict):
    """The mean loss per label of each evaluation stage ("val" or "test"), over all batches and processes."""

    def __init__(self) -> None:
        super().__init__({f"{stage}_mean": MeanPerLabel() for stage in ("val", "test")})

    def add(self, stage: str, loss_sum: Tensor, labels: Tensor) -> None:
        """Count in a batch's summed loss over that many labels."""
        self._mean(stage).update(loss_sum, labels)

    def start_over(self, stage: str) -> None:
        """Forget what was counted in the stage."""
        self._mean(stage).reset()

    def loss(self, stage: str) -> Tensor:
        """The stage's loss."""
        loss: Tensor = self._mean(stage).compute()
        return loss

    def _mean(self, stage: str) -> MeanPerLabel:
        mean = self[f"{stage}_mean"]
        assert isinstance(mean, MeanPerLabel)
        return mean


def figures(stage: str, losses: TokenLosses, entropies: TokenLosses) -> dict[str, Tensor]:
    """The stage's loss, and its perplexity: e to the mean cross-entropy per label."""
    return {f"{stage}_loss": losses.loss(stage), f"{stage}_perplexity": torch.exp(entropies.loss(stage))}
