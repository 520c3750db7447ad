"""LoRA: Low-Rank Adaptation of Large Language Models.

Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen, 2021,
https://arxiv.org/abs/2106.09685
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.linear import is_linear, widths
from peftlight.strategy import PEFTStrategy
from peftlight.targets import Selection, check_patterns, matching, pattern_value, select


@dataclass
class LoRA(PEFTStrategy):
    """Add a trained product of two low-rank matrices to chosen layers; the layers themselves stay frozen."""

    rank: int = 8
    """Rank r of the update."""
    alpha: float = 16
    """Numerator of the scale alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of the update."""
    target_modules: str | list[str] | None = None
    """Names of layers, a preset (attention, attention+mlp, all-linear) or a regex; none: the architecture's default."""
    exclude_modules: list[str] | None = None
    """Names of layers to leave alone."""
    layers: str | list[int] | None = None
    """Which blocks of the stack: "last 4", "first 2", "0-3", or a list of numbers; none: all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another rank for the modules whose name ends with a pattern."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Another alpha for the modules whose name ends with a pattern."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained too: none, all, or those of the adapted layers."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules of the base that are trained whole and saved with the adapter."""

    def __post_init__(self) -> None:
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise UserError(f"LoRA needs a rank of at least 1; {where} is {rank}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's dropout is a share from 0 up to, not including, 1; got {self.dropout}.")

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        selection = self._selection(model)
        if selection.notice:
            logging.getLogger("peftlight").warning(selection.notice)
        sites = selection.modules
        check_patterns("rank_pattern", self.rank_pattern, sites)
        check_patterns("alpha_pattern", self.alpha_pattern, sites)
        for name, module in sites.items():
            rank = pattern_value(self.rank_pattern, name, self.rank)
            alpha = pattern_value(self.alpha_pattern, name, self.alpha)
            yield name, _delta_for(name, module, rank, alpha / rank, self.dropout)

    def train(self, model: nn.Module) -> Iterable[str]:
        names = matching(model, self.modules_to_save)
        if self.bias == "all":
            names += [name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"]
        if self.bias == "lora_only":
            sites = self._selection(model).modules.items()
            names += [f"{name}.bias" for name, module in sites if getattr(module, "bias", None) is not None]
        return names

    def _selection(self, model: nn.Module) -> Selection:
        whole = _trained_whole(model) + matching(model, self.modules_to_save)
        return select(
            model, self.target_modules, _KINDS, exclude_modules=self.exclude_modules, layers=self.layers, skip=whole
        )


_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)


def _trained_whole(model: nn.Module) -> list[str]:
    """Modules whose weight is already trained: a head takes no LoRA on top."""
    weights = ((name, getattr(module, "weight", None)) for name, module in model.named_modules())
    return [name for name, weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]


def _delta_for(name: str, module: nn.Module, rank: int, scale: float, dropout: float) -> Delta:
    if is_linear(module):
        inputs, outputs = widths(module)
        return LinearLoRA((rank, inputs), (outputs, rank), scale, dropout)
    if isinstance(module, nn.Embedding):
        return EmbeddingLoRA(rank, module.num_embeddings, module.embedding_dim, scale)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        if rank % module.groups:
            raise UserError(f"{name} is a convolution of {module.groups} groups: its rank {rank} must be a multiple.")
        ones = (1,) * len(module.kernel_size)
        return ConvLoRA(
            (rank, module.in_channels, *module.kernel_size),
            (module.out_channels, rank // module.groups, *ones), scale, dropout,
        )  # fmt: skip
    raise UserError(f"LoRA cannot adapt {name}, a {type(module).__name__}.")


class LinearLoRA(Delta):
    """h = W x + b + s B A dropout(x), with A (rank, in), B (out, rank), s = alpha / rank (equation 3).

    A starts uniform in ±1/√in, B at zero, so that the output is unchanged at the start.
    """

    def __init__(self, shape_a: tuple[int, ...], shape_b: tuple[int, ...], scale: float, dropout: float) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(shape_a, dtype=torch.float32, device="cpu"))
        self.B = nn.Parameter(torch.empty(shape_b, dtype=torch.float32, device="cpu"))
        self.scale = scale
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # A is drawn twice and B once in vain: the same random numbers as HF PEFT, so that a seed gives its weights.
        for parameter in (self.A, self.B, self.A):
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        nn.init.zeros_(self.B)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        update = F.linear(F.linear(self.dropout(x.to(self.A.dtype)), self.A), self.B) * self.scale
        return (y + update).to(y.dtype)


class ConvLoRA(LinearLoRA):
    """As `LinearLoRA`: A (rank, in, *kernel) convolves as the base does, B (out, rank / groups, 1...) is pointwise."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        module = base.module
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        inner = _convolve(module, self.dropout(x.to(self.A.dtype)), self.A)
        convolve = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
        update = convolve(inner, self.B, groups=module.groups)
        return (y + update * self.scale).to(y.dtype)


class EmbeddingLoRA(Delta):
    """h = E[x] + s B A[:, x], with A (rank, vocabulary), B (dim, rank). A starts at zero, B normal."""

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
        table = base.module
        assert isinstance(table, nn.Embedding)
        inner = F.embedding(x, self.A.T, table.padding_idx)
        # Gemma multiplies its embeddings by a constant; the update belongs to the table, so it is multiplied too.
        scale = self.scale * getattr(table, "embed_scale", 1.0)
        return (y + F.linear(inner, self.B) * scale).to(y.dtype)


def _convolve(module: nn.Conv1d | nn.Conv2d, x: Tensor, weight: Tensor) -> Tensor:
    """Convolve `x` with `weight` as `module` does, but without its bias and over all channels at once."""
    padding: Any = module.padding
    if module.padding_mode != "zeros":
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        padding = 0
    convolve: Any = F.conv1d if isinstance(module, nn.Conv1d) else F.conv2d
    return convolve(x, weight, None, module.stride, padding, module.dilation)
