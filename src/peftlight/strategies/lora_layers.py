"""The deltas of plain LoRA, one for each kind of layer, with the paper's names for the matrices."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Delta, Factors
from peftlight.errors import UserError
from peftlight.linear import is_linear, widths


class LinearLoRA(Delta):
    """h = W x + b + s B A dropout(x), with A (rank, in), B (out, rank), s = alpha / rank (equation 3).

    A starts uniform in ±1/√in, or normal with deviation 1 / rank; B starts at zero, so that the output is unchanged.
    """

    def __init__(
        self,
        shape_a: tuple[int, ...],
        shape_b: tuple[int, ...],
        scale: float,
        dropout: float = 0.0,
        gaussian: bool = False,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(shape_a, dtype=torch.float32, device="cpu"))
        self.B = nn.Parameter(torch.empty(shape_b, dtype=torch.float32, device="cpu"))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # A is drawn twice and B once in vain: the same random numbers as HF PEFT, so that a seed gives its weights.
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
        if gaussian:
            nn.init.normal_(self.A, std=1 / shape_a[0])
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        inner = F.linear(self.dropout(x.to(self.A.dtype)), self.A) * self.scale
        return (y + F.linear(inner, self.B)).to(y.dtype)

    def factors(self) -> Factors | None:
        return self.A.flatten(1), self.B.flatten(1) * self.scale


class ConvLoRA(LinearLoRA):
    """As `LinearLoRA`: A (rank, in, *kernel) convolves as the base does, B (out, rank / groups, 1...) is pointwise."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        update = convolved_twice(base.module, self.dropout(x.to(self.A.dtype)), self.A, self.B)
        return (y + update * self.scale).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self._groups > 1:
            raise UserError(
                f"a convolution of {self._groups} groups cannot hold the update, in which every output sees all inputs."
            )
        return super().fold(weight, bias)

    def factors(self) -> Factors | None:
        return super().factors() if self._groups == 1 else None

    @property
    def _groups(self) -> int:
        return self.A.shape[0] // self.B.shape[1]


class EmbeddingLoRA(Delta):
    """h = E[x] + s B A[:, x], with A (rank, vocabulary), B (dim, rank). A starts at zero, B normal."""

    in_float32: tuple[str, ...] = ("B",)

    def __init__(self, rank: int, vocabulary: int, dim: int, scale: float) -> None:
        super().__init__()
        # Drawn, then drawn again or zeroed: the same random numbers as HF PEFT.
        self.A = nn.Parameter(torch.randn(rank, vocabulary, dtype=torch.float32, device="cpu"))
        self.B = nn.Parameter(torch.randn(dim, rank, dtype=torch.float32, device="cpu"))
        self.scale = scale
        nn.init.zeros_(self.A)
        nn.init.normal_(self.B)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        inner = self._inner(base.module, x)
        return (y + F.linear(inner, self.B.to(inner.dtype))).to(y.dtype)

    def _inner(self, table: nn.Module, x: Tensor) -> Tensor:
        """s A[:, x], as (..., rank)."""
        assert isinstance(table, nn.Embedding)
        # Gemma multiplies its embeddings by a constant; the update belongs to the table, so it is multiplied too.
        scale = self.scale * getattr(table, "embed_scale", 1.0)
        return F.embedding(x, self.A.T, table.padding_idx) * scale

    def factors(self) -> Factors | None:
        return self.B.T, self.A.T * self.scale


def largest_rank(module: nn.Module) -> int:
    """The rank above which an update of the layer gains nothing: the smaller side of its weight."""
    if is_linear(module):
        return min(widths(module))
    if isinstance(module, nn.Embedding):
        return min(module.num_embeddings, module.embedding_dim)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    return min(module.in_channels * math.prod(module.kernel_size) * module.groups, module.out_channels)


def matrix_shapes(module: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B on a linear layer or a convolution."""
    if is_linear(module):
        inputs, outputs = widths(module)
        return (rank, inputs), (outputs, rank)
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    ones = (1,) * len(module.kernel_size)
    return (
        (rank, module.in_channels, *module.kernel_size),
        (module.out_channels, rank // module.groups, *ones),
    )


def plain_lora(A: Tensor, B: Tensor, scale: float, dropout: float) -> LinearLoRA:
    """The delta with just these matrices; no random number is drawn."""
    with torch.random.fork_rng(devices=[]):
        delta = LinearLoRA(tuple(A.shape), tuple(B.shape), scale, dropout)
    delta.A, delta.B = nn.Parameter(A.detach()), nn.Parameter(B.detach())
    return delta


def convolved_twice(module: nn.Module, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """B A x, where A convolves as `module` does, but without its bias and over all channels at once."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    convolve: Any = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    inner = convolve(x, A, None, module.stride, padding, module.dilation)
    update: Tensor = convolve(inner, B, groups=module.groups)
    return update
