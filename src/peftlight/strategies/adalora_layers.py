"""The delta of AdaLoRA, and how its singular values are weighed and chosen."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Delta, Factors
from peftlight.shards import sharded_like, whole
from peftlight.strategy import Adapter


def drawn(inputs: int, outputs: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A (rank, in), E (rank, 1) and B (out, rank) as they start."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    # All are drawn in vain once, and one number more: as HF PEFT does, so that a seed gives its weights.
    a, e, b, _ = (torch.randn(shape, **options) for shape in ((rank, inputs), (rank, 1), (outputs, rank), (1,)))
    return nn.init.normal_(a, std=0.02), nn.init.zeros_(e), nn.init.normal_(b, std=0.02)


class SVDLinear(Delta):
    """h = W x + b + s P Λ Q dropout(x) (equation 3), with A = Q (r, in), E = the diagonal of Λ (r, 1), B = P (out, r).

    s = alpha / init_r. E starts at zero, so that the output is unchanged at the start.
    """

    def __init__(self, a: Tensor, e: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__()
        self.A, self.E, self.B = nn.Parameter(a), nn.Parameter(e), nn.Parameter(b)
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        update = F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A * self.E), self.B) * self.scale
        return (y + update).to(y.dtype)

    def factors(self) -> Factors | None:
        return self.A * self.E, self.B * self.scale

    def rank(self) -> Tensor:
        """The number of singular values, as a scalar."""
        return torch.tensor(len(self.A), device=self.A.device)

    def finished(self) -> "SVDLinear":
        return self


class PrunedSVDLinear(SVDLinear):
    """An `SVDLinear` with what the choice of its singular values rests on, in buffers, so that checkpoints hold it."""

    mask: Tensor
    """(r,): the singular values that are left."""
    settled: Tensor
    """A scalar: whether the final budget was reached."""

    def __init__(self, a: Tensor, e: Tensor, b: Tensor, scale: float, dropout: float) -> None:
        super().__init__(a, e, b, scale, dropout)
        for name, parameter in self.named_parameters():
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(parameter.detach()))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(parameter.detach()))
        self.register_buffer("mask", torch.ones(len(a), dtype=torch.bool))
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool))

    def averages(self, of: str) -> list[Tensor]:
        """The moving averages of A, E and B; `of` is sensitivity or uncertainty."""
        return [self.get_buffer(f"{of}_{name}") for name in "AEB"]

    def prune(self) -> None:
        """Set the singular values that are gone to zero."""
        gone = ~self.mask[:, None]
        with torch.no_grad():
            self.E.masked_fill_(sharded_like(gone, self.E), 0.0)

    def rank(self) -> Tensor:
        return self.mask.sum()

    def finished(self) -> SVDLinear:
        """Without what is gone. Between two allocations a value may be on its way back; it is kept."""
        a, e, b = (whole(parameter.detach()) for parameter in (self.A, self.E, self.B))
        left = self.mask | (e[:, 0] != 0)
        done = SVDLinear(a[left], e[left], b[:, left], self.scale, 0.0)
        done.dropout = self.dropout
        return done.train(self.training)


def updates(adapter: Adapter) -> dict[str, SVDLinear]:
    """The updates of an adapter by their sites."""
    return {site: delta for site, delta in adapter.sites.items() if isinstance(delta, SVDLinear)}


def distances(matrices: Sequence[Tensor]) -> Tensor:
    """(n,): of each matrix M (r, width), the Frobenius norm of M Mᵀ - 1."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.shape, []).append(matrix)
    norms = []
    for (rank, _), group in by_shape.items():
        rows = torch.stack(group)
        norms.append(torch.linalg.vector_norm(rows @ rows.mT - torch.eye(rank).to(rows), dim=(1, 2)))
    return torch.cat(norms)


@torch.no_grad()
def weigh(deltas: Sequence[PrunedSVDLinear], beta1: float, beta2: float) -> None:
    """Average the sensitivity |w ∂L/∂w| of every weight, and its uncertainty (section 3.2).

    A step whose gradients are not finite says nothing, and is left out; automatic mixed precision has such steps.
    """
    parameters = [parameter for delta in deltas for parameter in (delta.A, delta.E, delta.B)]
    gradients = [whole(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if len(gradients) < len(parameters) or not torch.stack(torch._foreach_norm(gradients)).isfinite().all():
        return
    now = torch._foreach_mul([whole(parameter.detach()) for parameter in parameters], gradients)
    torch._foreach_abs_(now)
    sensitivity = [average for delta in deltas for average in delta.averages("sensitivity")]
    torch._foreach_lerp_(sensitivity, now, 1 - beta1)
    torch._foreach_sub_(now, sensitivity)
    torch._foreach_abs_(now)
    torch._foreach_lerp_([average for delta in deltas for average in delta.averages("uncertainty")], now, 1 - beta2)


@torch.no_grad()
def allocate(deltas: Sequence[PrunedSVDLinear], budget: int) -> None:
    """Leave the `budget` most important singular values of all layers; of equal ones, the first.

    The importance of a singular value is that of its own weight and the means over its two vectors (section 3.2).
    """
    scores = torch._foreach_mul(*([m for d in deltas for m in d.averages(of)] for of in ("sensitivity", "uncertainty")))
    by_layer = [e[:, 0] + (a.mean(1) + b.mean(0)) for a, e, b in zip(*[iter(scores)] * 3, strict=True)]
    importance = torch.stack(by_layer)
    best = torch.sort(importance.flatten(), descending=True, stable=True).indices[:budget]
    left = torch.zeros_like(importance, dtype=torch.bool)
    left.view(-1)[best] = True
    for delta, mask in zip(deltas, left, strict=True):
        delta.mask.copy_(mask)
        delta.prune()
