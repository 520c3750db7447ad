"""(IA)³: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning.

Haokun Liu, Derek Tam, Mohammed Muqeeth, Jay Mohta, Tenghao Huang, Mohit Bansal, Colin Raffel, 2022,
https://arxiv.org/abs/2205.05638
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftlight.blocks import blocks_for
from peftlight.delta import Base, Delta
from peftlight.errors import UserError, listed
from peftlight.linear import widths
from peftlight.strategy import PEFTStrategy
from peftlight.targets import chosen, matching


@dataclass
class IA3(PEFTStrategy):
    """Scale keys, values and the inner activations of the feed-forward part by trained vectors that start at one."""

    target_modules: str | list[str] | None = None
    """Names of layers, a preset or a regex; none: keys, values and the feed-forward's last layer in every block."""
    feedforward_modules: list[str] | None = None
    """Of these layers, those whose input is scaled instead of their output; none: the feed-forward's last layers."""
    exclude_modules: list[str] | None = None
    """Names of layers to leave alone."""
    layers: str | list[int] | None = None
    """Which blocks of the stack: "last 4", "first 2", "0-3", or a list of numbers; none: all."""

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        targets = _keys_values_and_outputs(model) if self.target_modules is None else self.target_modules
        sites = chosen(
            model, targets, (nn.Linear,), exclude_modules=self.exclude_modules, layers=self.layers, method="IA3"
        )
        feed_forward = self._feed_forward(model, sites)
        for name, module in sites.items():
            inputs, outputs = widths(module)
            yield name, InputScale(inputs) if name in feed_forward else OutputScale(outputs)

    def _feed_forward(self, model: nn.Module, sites: dict[str, nn.Module]) -> set[str]:
        if self.feedforward_modules is None:
            return {block.feed_forward.output for block in blocks_for("IA3", model) if block.feed_forward}
        named = {entry: set(matching(model, [entry])) & sites.keys() for entry in self.feedforward_modules}
        lost = [entry for entry, names in named.items() if not names]
        if lost:
            raise UserError(
                f"feedforward_modules: {listed(lost)} are not among the layers that target_modules selects: "
                f"{listed(sites)}. Add them there."
            )
        return {name for names in named.values() for name in names}


def _keys_values_and_outputs(model: nn.Module) -> list[str]:
    """As in section 3.3; where one layer makes queries, keys and values, its whole output is scaled, as in HF PEFT."""
    names: list[str] = []
    for block in blocks_for("IA3", model):
        for attention in block.attentions:
            names += [name for name in (attention.key, attention.value, attention.fused) if name]
        names += [block.feed_forward.output] if block.feed_forward else []
    return names


class OutputScale(Delta):
    """h = l ∘ (W x + b), with l (out,) starting at one: l_k and l_v of the paper."""

    in_float32 = ("",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(width, dtype=torch.float32, device="cpu"))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return (y * self.l).to(y.dtype)

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        scale = self.l.to(weight)
        return weight * scale[:, None], None if bias is None else bias * scale


class InputScale(Delta):
    """h = W (l ∘ x) + b, with l (in,) starting at one: l_ff of the paper, on the activations that W reads."""

    in_float32 = ("",)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(width, dtype=torch.float32, device="cpu"))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base((x * self.l).to(x.dtype))
        return y

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.l.to(weight), bias
