"""HyperLoRA: Instant Transformer Adaption via HyperLoRA (published as Text-to-LoRA).

Rujikorn Charakorn, Edoardo Cetin, Yujin Tang, Robert Tjarko Lange, 2024,
https://openreview.net/forum?id=u6vC7KaFel and, in 2025, https://arxiv.org/abs/2506.06105

The paper serves text tasks: a network reads the embedding of a task's description, of a module's kind and of its
layer, and writes that layer's low-rank factors. Here a run has one task, so its embedding is trained with the network,
and what is saved at the end is the plain LoRA that the network wrote.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Delta, Factors
from peftlight.errors import UserError
from peftlight.paths import leaf_of, place_of
from peftlight.strategies.lora import LoRA
from peftlight.strategies.lora_layers import LinearLoRA, plain_lora
from peftlight.strategy import Adapter, PEFTStrategy


@dataclass
class HyperLoRA(PEFTStrategy):
    """Train one small network that writes the LoRA of every layer from an embedding of task, layer and kind."""

    rank: int = 8
    """Rank r of the update."""
    alpha: float = 16
    """Numerator of the scale alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of the update."""
    embedding_size: int = 16
    """Width of each of the embeddings of task, layer and kind of module."""
    hidden_size: int = 32
    """Width of the network; each of its units costs rank x (inputs + outputs) numbers for every kind of module."""
    target_modules: str | list[str] | None = None
    """Names of layers, a preset (attention, attention+mlp, all-linear) or a regex; none: the architecture's default."""
    exclude_modules: list[str] | None = None
    """Names of layers to leave alone."""
    layers: str | list[int] | None = None
    """Which blocks of the stack: "last 4", "first 2", "0-3", or a list of numbers; none: all."""

    def __post_init__(self) -> None:
        for name in ("embedding_size", "hidden_size"):
            if getattr(self, name) < 1:
                raise UserError(f"HyperLoRA's {name} is at least 1; got {getattr(self, name)}.")
        self._plain()

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        plain = dict(self._plain().deltas(model))
        others = [name for name, delta in plain.items() if type(delta) is not LinearLoRA]
        if others:
            raise UserError(
                f"HyperLoRA writes the factors of linear layers; {others[0]} is none. "
                + ("Leave it out (exclude_modules)." if len(others) < len(plain) else "Choose LoRA instead.")
            )
        layers = list(dict.fromkeys(place_of(name) for name in plain))
        shapes = [(delta.get_parameter("A").shape, delta.get_parameter("B").shape) for delta in plain.values()]
        kinds = list(dict.fromkeys((leaf_of(name), *shape) for name, shape in zip(plain, shapes, strict=True)))
        network = HyperNetwork(len(layers), [kind[1:] for kind in kinds], self.embedding_size, self.hidden_size)
        for (name, delta), shape in zip(plain.items(), shapes, strict=True):
            assert isinstance(delta, LinearLoRA)
            yield name, WrittenLoRA(network, layers.index(place_of(name)), kinds.index((leaf_of(name), *shape)), delta)

    def finished(self, adapter: Adapter) -> PEFTStrategy:
        return LoRA(self.rank, self.alpha, self.dropout, list(adapter.sites))

    def _plain(self) -> LoRA:
        """The LoRA whose factors the network writes."""
        return LoRA(self.rank, self.alpha, self.dropout, self.target_modules, self.exclude_modules, self.layers)


class HyperNetwork(nn.Module):
    """A, B = h(z_task, E_layer[l], E_kind[m]) (equation 4): embeddings side by side, two layers, two heads a kind.

    B's heads start at zero, so that no update is written at first; A's heads start as LoRA's A does.
    """

    def __init__(self, layers: int, shapes: list[tuple[torch.Size, torch.Size]], embedding: int, hidden: int) -> None:
        super().__init__()
        self.task = nn.Parameter(torch.randn(embedding, dtype=torch.float32, device="cpu"))
        self.layer = nn.Embedding(layers, embedding, device="cpu")
        self.kind = nn.Embedding(len(shapes), embedding, device="cpu")
        self.trunk = nn.Sequential(
            nn.Linear(3 * embedding, hidden, device="cpu"), nn.SiLU(),
            nn.Linear(hidden, hidden, device="cpu"), nn.SiLU(),
        )  # fmt: skip
        self.shapes = shapes
        self.heads_a = nn.ModuleList(nn.Linear(hidden, a.numel(), device="cpu") for a, _ in shapes)
        self.heads_b = nn.ModuleList(nn.Linear(hidden, b.numel(), device="cpu") for _, b in shapes)
        for head, (a, _) in zip(self.heads_a, shapes, strict=True):
            nn.init.uniform_(head.get_parameter("bias"), -(a[1] ** -0.5), a[1] ** -0.5)
            nn.init.uniform_(head.get_parameter("weight"), -((hidden * a[1]) ** -0.5), (hidden * a[1]) ** -0.5)
        for head in self.heads_b:
            nn.init.zeros_(head.get_parameter("weight"))
            nn.init.zeros_(head.get_parameter("bias"))

    def forward(self, layer: int, kind: int) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of one layer."""
        inner = self.trunk(torch.cat([self.task, self.layer.weight[layer], self.kind.weight[kind]]))
        shape_a, shape_b = self.shapes[kind]
        return self.heads_a[kind](inner).view(shape_a), self.heads_b[kind](inner).view(shape_b)


class WrittenLoRA(Delta):
    """h = W x + b + s B A dropout(x), where the shared network writes A (r, in) and B (out, r)."""

    in_float32 = ("",)

    def __init__(self, network: HyperNetwork, layer: int, kind: int, plain: LinearLoRA) -> None:
        super().__init__()
        self.network, self.layer, self.kind = network, layer, kind
        self.scale, self.dropout = plain.scale, plain.dropout

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        a, b = self.network(self.layer, self.kind)
        return (y + F.linear(F.linear(self.dropout(x.to(a.dtype)), a) * self.scale, b)).to(y.dtype)

    def factors(self) -> Factors | None:
        a, b = self.network(self.layer, self.kind)
        return a, b * self.scale

    @torch.no_grad()
    def finished(self) -> Delta:
        a, b = self.network(self.layer, self.kind)
        return plain_lora(a, b, self.scale, getattr(self.dropout, "p", 0.0))
