"""The delta of prefix tuning, and what makes the keys and values of one attention's prefix."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.attention import prefixed
from peftlight.delta import Base, Delta


class PrefixDelta(Delta):
    """softmax(q [P_k; K]ᵀ / √d) [P_v; V] in place of softmax(q Kᵀ / √d) V, with P_k, P_v (num_virtual_tokens, width).

    Width is d times the number of heads that keys and values have. The paper trains the activations at the first
    positions of each layer (equation 3); of these, the tokens after them see the keys and values alone.
    """

    in_float32 = ("",)

    def __init__(self, prefix: nn.Module) -> None:
        super().__init__()
        self.prefix = prefix

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        keys, values = self.prefix()
        with prefixed(base.module, keys, values):
            return base(*args, **kwargs)

    def finished(self) -> Delta:
        return type(self)(self.prefix.finished()) if isinstance(self.prefix, ProjectedPrefix) else self


class Prefix(nn.Module):
    """P_k and P_v themselves."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = nn.Parameter(keys.clone()), nn.Parameter(values.clone())

    def forward(self) -> tuple[Tensor, Tensor]:
        return self.keys, self.values


class Trunk(nn.Module):
    """tanh(W E + b), from which the prefixes of all layers are made; E is (num_virtual_tokens, width of the keys)."""

    def __init__(self, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width, dtype=torch.float32, device="cpu"))
        self.hidden = nn.Linear(width, hidden, dtype=torch.float32, device="cpu")

    def forward(self) -> Tensor:
        return torch.tanh(self.hidden(self.embedding))


class ProjectedPrefix(nn.Module):
    """[P_k, P_v] = W' trunk + b' (section 4.3): the rows W' (2 width, hidden) of the last layer that are this layer's.

    So the large last layer is computed once for all layers of the model, and the small trunk once for each.
    """

    def __init__(self, trunk: Trunk, weight: Tensor, bias: Tensor, sizes: tuple[int, int]) -> None:
        super().__init__()
        self.trunk = trunk
        self.weight, self.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
        self.sizes = sizes

    def forward(self) -> tuple[Tensor, Tensor]:
        keys, values = F.linear(self.trunk(), self.weight, self.bias).split(self.sizes, dim=1)
        return keys, values

    @torch.no_grad()
    def finished(self) -> Prefix:
        """The prefix that the network makes now, without the network."""
        return Prefix(*self())


class SamePrefix(nn.Module):
    """The prefix of another layer, whose parameters stay that layer's."""

    def __init__(self, prefix: nn.Module) -> None:
        super().__init__()
        self.of = (prefix,)  # in a tuple, so that it is no child

    def forward(self) -> tuple[Tensor, Tensor]:
        keys, values = self.of[0]()
        return keys, values
