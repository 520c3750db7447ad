"""Strategies that break a promise, each in its own way; named by their class path, as a user's own are."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peftlight.delta import Base, Delta
from peftlight.strategies.lora import LoRA
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.targets import select


@dataclass
class Counting(LoRA):
    """Its loss grows with a counter that no checkpoint holds."""

    counted = 0

    def penalty(self, adapter: Adapter) -> Tensor:
        self.counted += 1
        return 0.1 * self.counted * _squares(adapter)


@dataclass
class OfOneProcess(LoRA):
    """Its gradient is another on the second process."""

    def penalty(self, adapter: Adapter) -> Tensor:
        return (1 + (dist.get_rank() if dist.is_initialized() else 0)) * _squares(adapter)


@dataclass
class Forgetful(PEFTStrategy):
    """A gain that moves in training and is in no file."""

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        for name, layer in select(model, "attention", (nn.Linear,)).modules.items():
            yield name, Gain(layer)

    def after_step(self, adapter: Adapter, step: int, last_step: int) -> None:
        for delta in adapter.sites.values():
            delta.gain += 0.5


@dataclass
class WronglyFolded(PEFTStrategy):
    """What it folds is not what it computes."""

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        for name, layer in select(model, "attention", (nn.Linear,)).modules.items():
            yield name, Halved(layer)


class Gain(Delta):
    """h = (1 + gain) W x + β."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.gain, self.beta = 0.0, nn.Parameter(torch.zeros(layer.out_features))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return (1 + self.gain) * base(x) + self.beta


class Halved(Gain):
    """h = W x + β, folded as half of W."""

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight / 2, self.beta if bias is None else bias + self.beta


def _squares(adapter: Adapter) -> Tensor:
    return torch.stack([p.square().sum() for p in adapter.parameters().values()]).sum()
