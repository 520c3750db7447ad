"""Full fine-tuning, the baseline: every parameter of the base is trained."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from peftlight.strategy import PEFTStrategy


@dataclass
class Full(PEFTStrategy):
    """Train the whole model. No copy of the base is kept, so the adapter cannot be removed."""

    restorable = False

    def train(self, model: nn.Module) -> Iterable[str]:
        return [""]
