"""SSF: Scaling & Shifting Your Features. Lian, Zhou, Feng, Wang, 2022, https://arxiv.org/abs/2210.08823."""

from dataclasses import dataclass

import torch
from torch import nn

from peftlight import PEFTStrategy
from peftlight.delta import Delta
from peftlight.linear import widths
from peftlight.targets import select


@dataclass
class SSF(PEFTStrategy):
    """Scale and shift the output of chosen layers."""

    target_modules: str | list[str] | None = "attention+mlp"
    """Names of layers, a preset (attention, attention+mlp, all-linear) or a regex."""

    def deltas(self, model):
        for name, layer in select(model, self.target_modules, (nn.Linear,)).modules.items():
            yield name, ScaleAndShift(widths(layer)[1])


class ScaleAndShift(Delta):
    """h = γ ∘ (W x + b) + β, with γ (out,) from one and β (out,) from zero."""

    def __init__(self, width):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, base, x):
        y = base(x)
        return (y * self.gamma + self.beta).to(y.dtype)
