"""Compacter: Efficient Low-Rank Hypercomplex Adapter Layers.

Rabeeh Karimi Mahabadi, James Henderson, Sebastian Ruder, 2021, https://arxiv.org/abs/2106.04647
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from peftlight.errors import UserError, listed
from peftlight.strategies.bottleneck import BottleneckAdapter, Projection


@dataclass
class Compacter(BottleneckAdapter):
    """Bottleneck adapters whose layers are sums of Kronecker products of small matrices, part of them shared.

    The paper's Compacter is "houlsby", its Compacter++ is "pfeiffer". Both train the base's normalisations too: that
    is `LayerNormTuning`, beside this.
    """

    reduction_factor: float = 32
    """Width of the stream over that of the bottleneck, which is rounded down."""
    activation: str = "gelu_new"
    """Between the two layers; the name of one in torch.nn, in small letters (relu, gelu, silu, leaky_relu, tanh)."""
    phm_dim: int = 4
    """n of the paper: terms of the sum, and size of the shared matrices; it divides both widths."""
    rank: int = 1
    """Rank of the matrices that are not shared."""
    shared: bool = True
    """Whether all layers share the n matrices of size n by n; otherwise each has its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phm_dim < 1 or self.rank < 1:
            raise UserError(f"phm_dim and rank are at least 1; got {self.phm_dim} and {self.rank}.")

    def projections(self) -> Projection:
        return partial(self._phm, PHMRule(self.phm_dim) if self.shared else None)

    def inner_width(self, site: str, width: int) -> int:
        inner, n = super().inner_width(site, width), self.phm_dim
        if width % n or inner % n:
            raise UserError(f"phm_dim {n} divides both widths, but {site} writes {width} features and the bottleneck "
                            f"has {inner}. {_fitting(width, inner, n)}")  # fmt: skip
        most = min(inner, width) // n
        if self.rank > most:
            raise UserError(f"rank {self.rank} is above what the matrices at {site} can have: a bottleneck of {inner} "
                            f"over phm_dim {n} leaves at most {most}.")  # fmt: skip
        return inner

    def _phm(self, rule: "PHMRule | None", inputs: int, outputs: int, mute: bool) -> nn.Module:
        return PHMLinear(inputs, outputs, PHMRule(self.phm_dim) if rule is None else rule, self.rank, mute)


def _fitting(width: int, inner: int, n: int) -> str:
    """The numbers that would fit."""
    common = math.gcd(width, inner)
    fitting = f"phm_dim may be {listed((k for k in range(1, common + 1) if common % k == 0), 16)}"
    near = [multiple for multiple in (inner // n * n, inner // n * n + n) if multiple]
    widths = " or ".join(f"{multiple} (reduction_factor {width / multiple:.6g})" for multiple in near)
    return f"{fitting}." if width % n else f"{fitting}; or the bottleneck's width {widths}."


class PHMRule(nn.Module):
    """The matrices A_1 to A_n of size (n, n), normal with deviation 0.01 at the start."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(n, n, n, dtype=torch.float32, device="cpu").normal_(std=0.01))


class PHMLinear(nn.Module):
    """y = W x + b with W = Σ_i A_i ⊗ (s_i t_i) (section 3 of the paper), s_i (out / n, rank), t_i (rank, in / n).

    The s_i are kept transposed. W is never made: with x and y as n rows x_j and y_p, of in / n and out / n features,
    y_p = Σ_i s_i Σ_j A_i[p, j] (t_i x_j), which takes n rank (in + out + n²) products for each token, not in · out.

    s and t start as uniform ones of Glorot and Bengio with a gain of √2, as in the authors' code; s at zero where the
    output is to be zero at the start.
    """

    in_float32 = ("",)

    def __init__(self, inputs: int, outputs: int, rule: PHMRule, rank: int, mute: bool) -> None:
        super().__init__()
        n = len(rule.A)
        self.rule = rule
        self.s = nn.Parameter(torch.zeros(n, rank, outputs // n, dtype=torch.float32, device="cpu"))
        self.t = nn.Parameter(torch.zeros(n, rank, inputs // n, dtype=torch.float32, device="cpu"))
        self.bias = nn.Parameter(torch.zeros(outputs, dtype=torch.float32, device="cpu"))
        for factor in [self.t] if mute else [self.s, self.t]:
            for each in factor.data:
                nn.init.xavier_uniform_(each, gain=math.sqrt(2))

    def forward(self, x: Tensor) -> Tensor:
        n, rank, _ = self.t.shape
        inner = x.unflatten(-1, (n, -1)) @ self.t.flatten(0, 1).T  # (..., j, i rank)
        mixed = torch.einsum("ipj,...jir->...pir", self.rule.A, inner.unflatten(-1, (n, rank)))
        y = mixed.flatten(-2) @ self.s.flatten(0, 1)  # (..., p, out / n)
        return y.flatten(-2) + self.bias
