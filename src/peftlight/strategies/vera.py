"""VeRA: Vector-based Random Matrix Adaptation.

Dawid J. Kopiczko, Tijmen Blankevoort, Yuki M. Asano, 2023, https://arxiv.org/abs/2310.11454
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Delta, Factors
from peftlight.errors import UserError
from peftlight.linear import widths
from peftlight.strategy import PEFTStrategy
from peftlight.targets import chosen


@dataclass
class VeRA(PEFTStrategy):
    """Train two vectors for each layer around one pair of frozen random matrices that all layers share."""

    rank: int = 256
    """Rank r of the shared matrices; larger than LoRA's, and it may exceed a layer's width."""
    d_initial: float = 0.1
    """Starting value of the vector d."""
    dropout: float = 0.0
    """Dropout on the input of the update."""
    target_modules: str | list[str] | None = None
    """Names of layers, a preset (attention, attention+mlp, all-linear) or a regex; none: the architecture's default."""
    exclude_modules: list[str] | None = None
    """Names of layers to leave alone."""
    layers: str | list[int] | None = None
    """Which blocks of the stack: "last 4", "first 2", "0-3", or a list of numbers; none: all."""
    projection_seed: int = 0
    """Draws the shared matrices, by a generator of its own on the CPU."""
    save_projection: bool = True
    """Whether the shared matrices are saved too; otherwise they are drawn again from the seed."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"VeRA needs a rank of at least 1; it is {self.rank}.")
        if self.d_initial == 0:
            raise UserError("VeRA's d_initial must not be 0: both vectors would have a gradient of zero for ever.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"VeRA's dropout is a share from 0 up to, not including, 1; got {self.dropout}.")

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        sites = chosen(
            model, self.target_modules, (nn.Linear,), exclude_modules=self.exclude_modules, layers=self.layers,
            method=type(self).__name__,
        )  # fmt: skip
        sizes = {name: widths(module) for name, module in sites.items()}
        widest = max(inputs for inputs, _ in sizes.values()), max(outputs for _, outputs in sizes.values())
        shared = Projections(*widest, self.rank, self.projection_seed, self.save_projection)
        for name, (inputs, outputs) in sizes.items():
            yield name, VeRADelta(shared, inputs, outputs, self.d_initial, self.dropout)


class Projections(nn.Module):
    """The frozen A (r, widest in) and B (widest out, r), uniform in ±√(6 / fan in) as He et al. initialise."""

    A: Tensor
    B: Tensor

    def __init__(self, inputs: int, outputs: int, rank: int, seed: int, saved: bool) -> None:
        super().__init__()
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            bound = math.sqrt(6 / shape[1])
            drawn = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, drawn, persistent=saved)


class VeRADelta(Delta):
    """h = W x + b + λ_b ∘ B (λ_d ∘ A x) (equation 2), with λ_b (out,) starting at zero and λ_d (r,) at d_initial.

    A and B are the first columns and rows of the shared matrices, as many as the layer is wide.
    """

    in_float32 = ("",)

    def __init__(self, shared: Projections, inputs: int, outputs: int, d_initial: float, dropout: float) -> None:
        super().__init__()
        self.shared, self.inputs, self.outputs = shared, inputs, outputs
        self.lambda_b = nn.Parameter(torch.zeros(outputs, dtype=torch.float32, device="cpu"))
        self.lambda_d = nn.Parameter(torch.full((shared.A.shape[0],), d_initial, dtype=torch.float32, device="cpu"))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        inner = F.linear(self.dropout(x.to(self.lambda_d.dtype)), self.shared.A[:, : self.inputs]) * self.lambda_d
        return (y + F.linear(inner, self.shared.B[: self.outputs]) * self.lambda_b).to(y.dtype)

    def factors(self) -> Factors | None:
        outer = self.lambda_b[:, None] * self.shared.B[: self.outputs]
        return self.lambda_d[:, None] * self.shared.A[:, : self.inputs], outer
