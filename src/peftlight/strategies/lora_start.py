"""LoRA that starts from parts of the weight itself.

PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models.
Fanxu Meng, Zhaohui Wang, Muhan Zhang, 2024, https://arxiv.org/abs/2404.02948

OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models.
Kerim Büyükakyüz, 2024, https://arxiv.org/abs/2406.01775
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Factors
from peftlight.linear import is_quantized, weight_of, widths
from peftlight.strategies.lora_layers import LinearLoRA, plain_lora


class DifferenceLoRA(LinearLoRA):
    """h = W x + b + s B A dropout(x) - s B₀ A₀ x, with A₀, B₀ the frozen values that A and B had at the start.

    The papers put W - s B₀ A₀ in the place of W and add s B A to it. That is the same output and the same gradients,
    but here W stays as it is: another adapter, or none, still finds the pretrained model. Without dropout the two
    products are one LoRA of rank 2 r, s ((B - B₀) A + B₀ (A - A₀)) x, in which nothing large cancels; so it is saved.
    """

    A0: Tensor
    B0: Tensor

    def __init__(
        self, shape_a: tuple[int, ...], shape_b: tuple[int, ...], scale: float, dropout: float, start: Factors
    ) -> None:
        super().__init__(shape_a, shape_b, scale, dropout)
        with torch.no_grad():
            self.A.copy_(start[0])
            self.B.copy_(start[1])
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        inputs = x.to(self.A.dtype)
        if self.training and isinstance(self.dropout, nn.Dropout):
            update = F.linear(F.linear(self.dropout(inputs), self.A), self.B)
            update = update - F.linear(F.linear(inputs, self.A0), self.B0)
            return (y + update * self.scale).to(y.dtype)
        A, B = self._as_one()
        return (y + F.linear(F.linear(inputs, A) * self.scale, B)).to(y.dtype)

    def factors(self) -> Factors | None:
        return self.finished().factors()

    def finished(self) -> LinearLoRA:
        return plain_lora(*self._as_one(), self.scale, getattr(self.dropout, "p", 0.0))

    def _as_one(self) -> Factors:
        return torch.cat([self.A, self.A - self.A0]), torch.cat([self.B - self.B0, self.B0], dim=1)


def start_from(module: nn.Module, rank: int, scale: float, how: str, iterations: int | None = None) -> Factors:
    """Where A and B start, from the weight of a linear layer as float32.

    Args:
        module: the linear layer.
        rank: r.
        scale: s.
        how: "pissa": A = √(Σ_r / s) V_rᵀ and B = U_r √(Σ_r / s) of W = U Σ Vᵀ (equations 2 and 3), so that s B A is
            the best approximation of W; or "olora": A = R_r and B = Q_r, the first rows and columns of W = Q R.
        iterations: of the randomised decomposition of PiSSA; None: the exact one.

    """
    weight = _full_weight(module)
    if how == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank], q[:, :rank]
    if iterations is None:
        u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
        u, sigma, v = u[:, :rank], sigma[:rank], v[:rank]
    else:
        u, sigma, columns = torch.svd_lowrank(weight, rank, niter=iterations)
        v = columns.T
    root = (sigma / scale).sqrt()
    return root.unsqueeze(1) * v, u * root


@torch.no_grad()
def _full_weight(module: nn.Module) -> Tensor:
    """The weight (out, in) as float32; of a layer quantized in another way, by what it makes of unit vectors."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    if weight.is_floating_point() or is_quantized(module):
        return weight_of(module).to(torch.float32)
    own, units = type(module).forward, torch.eye(widths(module)[0], device=weight.device)
    columns: Tensor = own(module, units).to(torch.float32) - own(module, 0 * units[:1]).to(torch.float32)
    return columns.T
