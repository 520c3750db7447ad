"""DoRA: Weight-Decomposed Low-Rank Adaptation.

Shih-Yang Liu, Chien-Yi Wang, Hongxu Yin, Pavlo Molchanov, Yu-Chiang Frank Wang, Kwang-Ting Cheng, Min-Hung Chen, 2024,
https://arxiv.org/abs/2402.09353
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Factors, with_product
from peftlight.linear import weight_of
from peftlight.strategies.lora_layers import ConvLoRA, EmbeddingLoRA, LinearLoRA, convolved_twice

_BLOCK = 1 << 22
"""Most numbers of the changed weight that exist at once."""


class LinearDoRA(LinearLoRA):
    """h = (m / ‖V‖) ∘ V x + b, with V = W + s B A and its norms by row, m (out,) trained (equation 5).

    m starts as the norms of W, so that the output is unchanged. ‖V‖ counts as a constant in the backward pass (section
    4.3). Dropout acts on the input of all that the delta adds: W x + b + (m / ‖V‖ - 1) W x' + (m / ‖V‖) s B A x' with
    x' = dropout(x). Over the delta of another adapter the same is added to what that one gives.
    """

    in_float32 = ("m",)
    reads_weight = True

    def __init__(
        self,
        shape_a: tuple[int, ...],
        shape_b: tuple[int, ...],
        scale: float,
        dropout: float,
        gaussian: bool,
        module: nn.Module,
    ) -> None:
        super().__init__(shape_a, shape_b, scale, dropout, gaussian)
        self.m = nn.Parameter(_start_of(self, weight_of(module)))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        dropped = self.dropout(x.to(self.A.dtype))
        factor = self.m / _norms(weight_of(base.module), self)
        update = F.linear(F.linear(dropped, self.A), (self.B * (factor * self.scale).unsqueeze(1)).to(dropped.dtype))
        own = _own_output(base, y, dropped.to(x.dtype), _drops(self))
        bias = getattr(base.module, "bias", None)
        own = own if bias is None else own - bias
        return (y + (factor - 1) * own + update).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _with_norms(_changed(weight, super().factors()), self.m), bias

    def factors(self) -> None:
        return None


class ConvDoRA(ConvLoRA):
    """As `LinearDoRA`, with a norm for each output channel; m is (1, out, 1...)."""

    in_float32 = ("m",)
    reads_weight = True

    def __init__(
        self,
        shape_a: tuple[int, ...],
        shape_b: tuple[int, ...],
        scale: float,
        dropout: float,
        gaussian: bool,
        module: nn.Module,
    ) -> None:
        super().__init__(shape_a, shape_b, scale, dropout, gaussian)
        self.m = nn.Parameter(_start_of(self, weight_of(module)).view(1, -1, *(1,) * (len(shape_a) - 2)))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        dropped = self.dropout(x.to(self.A.dtype))
        factor = self.m / _norms(weight_of(base.module), self).view_as(self.m)
        update = convolved_twice(base.module, dropped, self.A, self.B) * (factor * self.scale)
        own = _own_output(base, y, dropped.to(x.dtype), _drops(self))
        bias = getattr(base.module, "bias", None)
        own = own if bias is None else own - bias.view(-1, *(1,) * (self.A.dim() - 2))
        return (y + (factor - 1) * own + update).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _with_norms(_changed(weight, super().factors()), self.m), bias

    def factors(self) -> None:
        return None


class EmbeddingDoRA(EmbeddingLoRA):
    """h = (m / ‖V‖) ∘ V[x], with V = E + s (B A)ᵀ and its norms by column, m (dim,) trained."""

    in_float32 = ("m", "B")
    reads_weight = True

    def __init__(self, rank: int, vocabulary: int, dim: int, scale: float, module: nn.Module) -> None:
        super().__init__(rank, vocabulary, dim, scale)
        self.m = nn.Parameter(_start_of(self, weight_of(module).T))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        factor = self.m / _norms(weight_of(base.module).T, self)
        inner = self._inner(base.module, x)
        update = F.linear(inner, (self.B * factor.unsqueeze(1)).to(inner.dtype))
        own = _own_output(base, y, x, dropping=False)
        return (y + (factor - 1) * own + update).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return _with_norms(_changed(weight, super().factors()).T, self.m).T, bias

    def factors(self) -> None:
        return None


@torch.no_grad()
def _start_of(delta: LinearLoRA | EmbeddingLoRA, weight: Tensor) -> Tensor:
    """The norms of the untouched weight, on the CPU."""
    zero = torch.zeros((), device=weight.device, dtype=torch.promote_types(weight.dtype, torch.float32))
    return _row_norms(weight, delta.A.flatten(1).to(zero), delta.B.flatten(1).to(zero) * 0, delta.scale).cpu()


def _norms(weight: Tensor, delta: LinearLoRA | EmbeddingLoRA) -> Tensor:
    """The norm of each row of W + s B A, detached; in full precision under autocast too."""
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        return _row_norms(weight, delta.A.flatten(1), delta.B.flatten(1), delta.scale)


def _row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """In blocks of rows, so that the changed weight need not fit into memory beside the weight.

    The norm from ‖W‖², W Aᵀ and A Aᵀ, which needs no changed weight, is neither faster (these products are narrow) nor
    exact where an update nearly cancels a row, and a stored ‖W‖² is wrong once the base's weights are loaded anew.
    """
    flat, kind = weight.flatten(1), torch.promote_types(A.dtype, torch.float32)
    rows = max(1, _BLOCK // flat.shape[1])
    blocks = [
        torch.linalg.vector_norm(torch.addmm(some.to(kind), b.to(kind), A.to(kind), alpha=scale), dim=1)
        for some, b in zip(flat.split(rows), B.split(rows), strict=True)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _drops(delta: LinearLoRA) -> bool:
    return delta.training and isinstance(delta.dropout, nn.Dropout)


def _own_output(base: Base, y: Tensor, x: Tensor, dropping: bool) -> Tensor:
    """What the module alone computes from `x`: the output `y` that is there, unless dropout or a delta changed it."""
    if base.direct:
        own: Tensor = base(x) if dropping else y
    else:
        own = type(base.module).forward(base.module, x)
    return own


def _changed(weight: Tensor, factors: Factors | None) -> Tensor:
    """V = W + s B A."""
    assert factors is not None  # a convolution of several groups takes no DoRA
    return with_product(weight, factors)


def _with_norms(weight: Tensor, m: Tensor) -> Tensor:
    """The weight with its rows scaled to the norms `m`."""
    factor = m.flatten().to(weight.dtype) / torch.linalg.vector_norm(weight.flatten(1), dim=1)
    return weight * factor.view(-1, *(1,) * (weight.dim() - 1))
