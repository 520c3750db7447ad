"""Bottleneck adapters: a small network of two layers inside each block.

"houlsby": Parameter-Efficient Transfer Learning for NLP.
Neil Houlsby, Andrei Giurgiu, Stanislaw Jastrzebski, Bruna Morrone, Quentin de Laroussilhe, Andrea Gesmundo,
Mona Attariyan, Sylvain Gelly, 2019, https://arxiv.org/abs/1902.00751

"pfeiffer": AdapterFusion: Non-Destructive Task Composition for Transfer Learning.
Jonas Pfeiffer, Aishwarya Kamath, Andreas Rücklé, Kyunghyun Cho, Iryna Gurevych, 2020,
https://arxiv.org/abs/2005.00247

"parallel": Towards a Unified View of Parameter-Efficient Transfer Learning.
Junxian He, Chunting Zhou, Xuezhe Ma, Taylor Berg-Kirkpatrick, Graham Neubig, 2021,
https://arxiv.org/abs/2110.04366
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from peftlight.blocks import Block, blocks_for
from peftlight.delta import Base, Delta
from peftlight.errors import UserError, listed, nearest
from peftlight.linear import widths
from peftlight.paths import place_of
from peftlight.strategies.activations import activation_named
from peftlight.strategies.parallel import ParallelAdapter, ParallelInput, Relay
from peftlight.strategy import PEFTStrategy
from peftlight.targets import select

Variant = Literal["houlsby", "pfeiffer", "parallel"]
Norm = Literal["none", "before", "after"]
Init = Literal["zero", "normal"]

Projection = Callable[[int, int, bool], nn.Module]
"""Makes a layer with `bias` from (inputs, outputs, whether its output is zero at the start)."""


@dataclass
class BottleneckAdapter(PEFTStrategy):
    """Put small networks of two layers into each block, found by structure.

    "houlsby" puts one after every attention, T5's cross-attention included, and one after the feed-forward part;
    "pfeiffer" the latter alone; "parallel" one beside the feed-forward part. All of them change the output of the
    linear layer that writes back to the stream, so the block's own dropout, residual addition and normalisation come
    after them. In training that differs from the code of Houlsby et al., where the block's dropout comes before the
    adapter; and Pfeiffer et al. also put the block's normalisation before theirs, which needs a layer norm inside the
    adapter here. Houlsby et al. train the base's normalisations too: that is `LayerNormTuning`, beside this.
    """

    variant: Variant = "houlsby"
    """Where they sit: houlsby, pfeiffer or parallel."""
    reduction_factor: float = 16
    """Width of the stream over that of the bottleneck, which is rounded down."""
    width: int | None = None
    """Width of the bottleneck; none: by reduction_factor."""
    activation: str = "relu"
    """Between the two layers; the name of one in torch.nn, in small letters (relu, gelu, silu, leaky_relu, tanh)."""
    residual: bool = True
    """Whether houlsby and pfeiffer add their input to their output."""
    layer_norm: Norm = "none"
    """A trained layer norm in the adapter: none, before its first layer, or after its second."""
    scale: float | Literal["learned"] = 1.0
    """Factor on the output, or learned from 1 on; He et al. have 4 for parallel."""
    dropout: float = 0.0
    """Dropout in the bottleneck, after the activation."""
    layers: str | list[int] | None = None
    """Which blocks of the stack: "last 4", "first 2", "0-3", or a list of numbers; none: all."""
    init: Init = "zero"
    """zero: the adapter starts as a no-op (He et al.); normal: near one (Houlsby et al.)."""

    def __post_init__(self) -> None:
        _check_word("variant", self.variant, get_args(Variant))
        _check_word("layer_norm", self.layer_norm, get_args(Norm))
        _check_word("init", self.init, get_args(Init))
        activation_named(self.activation)
        if self.reduction_factor <= 0:
            raise UserError(f"reduction_factor is above 0, and above 1 to reduce; got {self.reduction_factor}.")
        if self.width is not None and self.width < 1:
            raise UserError(f"width is at least 1; got {self.width}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is a share from 0 up to, not including, 1; got {self.dropout}.")
        if self.scale == 0 or (isinstance(self.scale, str) and self.scale != "learned"):
            raise UserError(f"scale is a number other than 0, or 'learned'; got {self.scale!r}.")
        if self.variant == "parallel" and not self.residual:
            raise UserError("residual: false leaves out what houlsby and pfeiffer add; parallel has no such term.")
        self.starts_unchanged = self.init == "zero" and self.residual

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        project, modules = self.projections(), dict(model.named_modules())
        for block in self._blocks(model):
            assert block.feed_forward is not None
            sites = [attention.output for attention in block.attentions] if self.variant == "houlsby" else []
            for site in [*sites, block.feed_forward.output]:
                width = widths(modules[site])[1]
                bottleneck = Bottleneck(width, self.inner_width(site, width), self, project)
                if self.variant != "parallel":
                    yield site, SequentialAdapter(bottleneck, self.residual)
                    continue
                relay = Relay(block.feed_forward.inputs[0])
                yield site, ParallelAdapter(bottleneck, relay)
                yield relay.source, ParallelInput(relay)

    def projections(self) -> Projection:
        """What makes the layers of all bottlenecks of one adapter."""
        return self._linear

    def inner_width(self, site: str, width: int) -> int:
        """Width of the bottleneck at a layer that writes `width` features.

        Raises:
            UserError: nothing is left.
        """
        inner = int(width / self.reduction_factor) if self.width is None else self.width
        if inner < 1:
            raise UserError(
                f"reduction_factor {self.reduction_factor:g} leaves no width: {site} writes {width} features, so it "
                f"may be at most {width}."
            )
        return inner

    def _linear(self, inputs: int, outputs: int, mute: bool) -> nn.Module:
        layer = nn.Linear(inputs, outputs, device="cpu", dtype=torch.float32)  # uniform in ±1/√inputs
        if self.init == "normal":
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        elif mute:
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        return layer

    def _blocks(self, model: nn.Module) -> list[Block]:
        """The blocks within `layers`, once it is sure that each of them can be adapted."""
        kind = type(self).__name__
        every = blocks_for(kind, model)
        reachable = select(model, "all-linear", (nn.Linear,), layers=self.layers).modules
        blocks = [block for block in every if any(name.startswith(f"{block.path}.") for name in reachable)]
        unfit = {block.path: lack for block in blocks if (lack := self._lack(block, reachable))}
        if not unfit:
            return blocks
        fit = sorted({place[1] for block in blocks if block.path not in unfit and (place := place_of(block.path))})
        path, lack = next(iter(unfit.items()))
        choice = f"Set layers to {fit}, or choose" if fit else "Choose"
        raise UserError(
            f"{kind} ({self.variant}) does not fit {len(unfit)} of {len(blocks)} blocks of this "
            f"{type(model).__name__}: {path} has {lack}. {choice} LoRA, which adapts any linear layer."
        )

    def _lack(self, block: Block, reachable: Collection[str]) -> str | None:
        """What the block has not, to be read after "it has"; None if the adapter fits."""
        if block.feed_forward is None:
            return "no feed-forward part of linear layers (mixtures of experts have none)"
        if self.variant == "houlsby" and not block.attentions:
            return "no attention whose linear layers are called (pfeiffer and parallel need none)"
        outputs = [attention.output for attention in block.attentions] if self.variant == "houlsby" else []
        bypassed = [name for name in [*outputs, block.feed_forward.output] if name not in reachable]
        return f"a layer whose weight is read past its forward, {listed(bypassed)}" if bypassed else None


def _check_word(field: str, word: str, known: tuple[str, ...]) -> None:
    if word not in known:
        raise UserError(f"{field}: {word!r} is not one of {listed(known)}.{nearest(word, known)}")


class Bottleneck(nn.Module):
    """f(h) = s up(dropout(act(down(h)))), with down (m, d) and up (d, m), each with a bias.

    A layer norm stands before `down` or after `up`. At the start up is zero; where a norm follows, its gain is zero
    instead, for the norm of zeros would pass no gradient that is of use.
    """

    in_float32 = ("norm_before", "norm_after", "scale")

    def __init__(self, width: int, inner: int, recipe: BottleneckAdapter, project: Projection) -> None:
        super().__init__()
        mute, norm = recipe.init == "zero", recipe.layer_norm
        self.norm_before = _layer_norm(width) if norm == "before" else nn.Identity()
        self.down: Any = project(width, inner, False)
        self.activation = activation_named(recipe.activation)()
        self.dropout = nn.Dropout(recipe.dropout) if recipe.dropout else nn.Identity()
        self.up: Any = project(inner, width, mute and norm != "after")
        self.norm_after = _layer_norm(width) if norm == "after" else nn.Identity()
        if mute and norm == "after":
            nn.init.zeros_(self.norm_after.get_parameter("weight"))
        self.scale: Any = recipe.scale
        if recipe.scale == "learned":
            self.scale = nn.Parameter(torch.ones((), dtype=torch.float32, device="cpu"))

    def forward(self, h: Tensor) -> Tensor:
        inner = self.activation(self.down(_normed(self.norm_before, h).to(self.up.bias.dtype)))
        outer: Tensor = _normed(self.norm_after, self.up(self.dropout(inner))) * self.scale
        return outer


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """The layer norm of x, in the norm's own number format; x where there is none."""
    normed: Tensor = norm(x.to(norm.weight.dtype)) if isinstance(norm, nn.LayerNorm) else x
    return normed


def _layer_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, device="cpu", dtype=torch.float32)


class SequentialAdapter(Delta):
    """h + f(h), with h = W x + b (figure 2 of Houlsby et al.); without the residual, f(h)."""

    def __init__(self, bottleneck: Bottleneck, residual: bool) -> None:
        super().__init__()
        self.bottleneck, self.residual = bottleneck, residual

    def forward(self, base: Base, x: Tensor) -> Tensor:
        h: Tensor = base(x)
        update = self.bottleneck(h)
        return (h + update if self.residual else update).to(h.dtype)
