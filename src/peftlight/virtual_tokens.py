"""Virtual tokens: trained vectors before the embeddings of the real tokens, with outputs of the real tokens alone.

Tokens come into a model at one module: its backbone, or the encoder of an encoder-decoder. What sees the virtual
tokens beyond that module, a pooler or a decoder, gets a delta of its own.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.delta import Base, Delta
from peftlight.errors import UserError

Inputs = dict[str, Any]

_BY_TOKEN = ("inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "global_attention_mask")
"""Inputs with a value for each token; the last is Longformer's."""


@dataclass(frozen=True)
class Entrance:
    """The module at which tokens come in."""

    path: str
    """Its path in the model."""
    names: tuple[str, ...]
    """The names of its inputs in order."""
    table: str
    """Path of its embedding of tokens, from the module."""
    width: int
    """Width of the embeddings."""
    first_position: int
    """Number of its first position: RoBERTa's is 2."""
    positions: int | None
    """How many tokens it has positions for; None: no limit is known."""

    def embed(self, module: nn.Module, tokens: Tensor) -> Tensor:
        """The embeddings (..., width) of tokens (...), as the module makes them itself."""
        embeddings: Tensor = module.get_submodule(self.table)(tokens)
        return embeddings


class Prompt(nn.Module):
    """Virtual tokens that are trained themselves: P (n, width)."""

    def __init__(self, weight: Tensor, pending: str | None = None) -> None:
        """
        Args:
            weight: the values to start from, (n, width).
            pending: why they cannot be used before others have been filled in or loaded.
        """
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.pending = pending

    def forward(self) -> Tensor:
        if self.pending:
            raise UserError(self.pending)
        return self.weight

    def fill(self, weight: Tensor) -> None:
        """Start from other values."""
        self.pending = None
        with torch.no_grad():
            self.weight.copy_(weight)


class VirtualTokens(Delta):
    """h = module([P; E(x)])[n:], with P (n, width) the virtual tokens and E(x) (length, width) the real ones.

    P takes the first n positions. Real tokens, counted without the padding, take those after it. In a row that is
    padded on the left, P stands behind the padding, as some models go by distance. So a row gives the same, padded or
    not. With a cache, P goes in with the first call and stays in the cache.
    """

    in_float32 = ("",)

    def __init__(self, prompt: nn.Module, count: int, entrance: Entrance, behind_padding: bool = True) -> None:
        """
        Args:
            prompt: gives (n, width), or more of which the first n are used, when called without arguments.
            count: the number n of virtual tokens.
            entrance: the module that this delta is put on.
            behind_padding: whether P stands behind the padding on the left, or before it.
        """
        super().__init__()
        self.prompt, self.count, self.entrance, self.behind_padding = prompt, count, entrance, behind_padding

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        inputs = named(self.entrance.names, args, kwargs)
        length, cached, mask = length_of(inputs), is_cached(inputs), inputs.get("attention_mask")
        if "position_ids" in self.entrance.names:
            inputs["position_ids"] = self._positions(inputs, length, cached)
        self.extend(inputs, "attention_mask", 1)
        if cached:
            self.arrange(inputs, mask, "attention_mask")
            return base(**inputs)
        self.extend(inputs, "token_type_ids", 0)
        self.extend(inputs, "global_attention_mask", 0)
        self.enter(base.module, inputs)
        self.arrange(inputs, mask, *_BY_TOKEN)
        kept = slice(-length, None) if mask is None or not self.behind_padding else real_places(mask, self.count)
        if inputs.get("return_dict") is False:
            return real_ones(base(**inputs | {"return_dict": True}), kept).to_tuple()
        return real_ones(base(**inputs), kept)

    def finished(self) -> Delta:
        """The virtual tokens without the network that makes them."""
        if isinstance(self.prompt, Prompt):
            return self
        twin = copy.deepcopy(self)
        with torch.no_grad():
            twin.prompt = Prompt(twin.prompt.eval()())
        return twin

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Values are about to be loaded, so none are waited for any more."""
        if isinstance(self.prompt, Prompt):
            self.prompt.pending = None

    def enter(self, module: nn.Module, inputs: Inputs) -> None:
        """Put embeddings, the virtual ones first, in place of the tokens."""
        embeddings = inputs.get("inputs_embeds")
        if embeddings is None:
            embeddings = self.entrance.embed(module, inputs["input_ids"])
        self.check_length(embeddings.shape[1])
        prompt = self.prompt()[: self.count].to(embeddings.dtype).expand(len(embeddings), -1, -1)
        inputs |= {"input_ids": None, "inputs_embeds": torch.cat([prompt, embeddings], 1)}

    def extend(self, inputs: Inputs, name: str, value: int) -> None:
        """Give the input of that name, where there is one, a `value` for each virtual token."""
        if inputs.get(name) is not None:
            inputs[name] = extended(inputs[name], self.count, value)

    def arrange(self, inputs: Inputs, mask: Tensor | None, *names: str) -> None:
        """In the inputs of those names, move what is in front behind the padding on the left of each row."""
        if mask is None or not self.behind_padding:
            return
        for name in names:
            if inputs.get(name) is not None:
                inputs[name] = padding_first(inputs[name], mask, self.count)

    def check_length(self, tokens: int) -> None:
        most = self.entrance.positions
        if most is not None and tokens + self.count > most:
            fewer = f", or set num_virtual_tokens to {most - tokens} or less" if tokens < most else ""
            raise UserError(
                f"Rows of {tokens} tokens and {self.count} virtual tokens need {tokens + self.count} positions, but "
                f"the model has {most}. Cut rows to {most - self.count} tokens (data.max_length){fewer}."
            )

    def _positions(self, inputs: Inputs, length: int, cached: bool) -> Tensor | None:
        """The positions of all that comes in now; None where the module counts right by itself."""
        positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if positions is None and mask is None:
            return None
        start = self.entrance.first_position
        if positions is None:
            positions = ((check(mask) != 0).cumsum(-1)[:, -length:] - 1).clamp(min=0) + start
        if cached:
            return positions + self.count
        virtual = torch.arange(start, start + self.count, device=positions.device, dtype=positions.dtype)
        return torch.cat([virtual.expand(*positions.shape[:-1], -1), positions + self.count], -1)


class EncoderVirtualTokens(VirtualTokens):
    """H = encoder([P; E(x)]) for a decoder, which reads the virtual positions of H (n + length, width) too."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        inputs = named(self.entrance.names, args, kwargs)
        length_of(inputs)
        mask = inputs.get("attention_mask")
        self.extend(inputs, "attention_mask", 1)
        self.enter(base.module, inputs)
        self.arrange(inputs, mask, "attention_mask", "inputs_embeds")
        return base(**inputs)


class DecoderSeesThem(Delta):
    """The decoder attends to H (n + length, width), so the mask of what it reads is extended as the encoder's is."""

    def __init__(self, count: int, names: tuple[str, ...], behind_padding: bool = True) -> None:
        super().__init__()
        self.count, self.names, self.behind_padding = count, names, behind_padding

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        inputs = named(self.names, args, kwargs)
        mask = inputs.get("encoder_attention_mask")
        if mask is not None:
            longer = extended(mask, self.count, 1)
            inputs["encoder_attention_mask"] = (
                padding_first(longer, mask, self.count) if self.behind_padding else longer
            )
        return base(**inputs)


class PoolerWithoutThem(Delta):
    """pool(h[n:]): a pooler takes the first token of h (n + length, width), which has to be the first real one."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, base: Base, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return base(hidden[:, self.count :], *args, **kwargs)


class LayersWithoutThem(PoolerWithoutThem):
    """layers(e)[n:], where the backbone itself takes the first token of this and pools that one alone (ALBERT)."""

    def forward(self, base: Base, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return real_ones(base(hidden, *args, **kwargs), slice(self.count, None))


class WholeModelVirtualTokens(VirtualTokens):
    """y = model([P; E(x)]), with the whole model given embeddings instead of tokens, as HF PEFT does.

    So logits of tokens are n longer, and the model's own labels are padded to match; what pools the first token pools
    a virtual one; what looks for the last token that is not padding takes the last one; positions count padding.
    """

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        inputs = named(self.entrance.names, args, kwargs)
        length, cached = length_of(inputs), is_cached(inputs)
        inputs.pop("position_ids", None)
        self.extend(inputs, "attention_mask", 1)
        if cached:
            return base(**inputs)
        self.extend(inputs, "token_type_ids", 0)
        labels = inputs.get("labels")
        if labels is not None and labels.shape[1:] == (length,) and not labels.is_floating_point():
            self.extend(inputs, "labels", -100)
        self.enter(base.module, inputs)
        return base(**inputs)


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Inputs) -> Inputs:
    """All inputs of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def length_of(inputs: Inputs) -> int:
    """How many tokens a row has.

    Raises:
        UserError: there are neither tokens nor embeddings, or both.
    """
    given = [inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
    if len(given) != 1:
        raise UserError("Give the model either input_ids or inputs_embeds.")
    length: int = given[0].shape[1]
    return length


def is_cached(inputs: Inputs) -> bool:
    """Whether there is a cache that holds tokens already, and the virtual ones among them."""
    cache = inputs.get("past_key_values")
    return cache is not None and cache.get_seq_length() > 0


def check(mask: Any) -> Tensor:
    """The mask, (batch, tokens).

    Raises:
        UserError: it has another shape, so that nobody can say where virtual tokens belong in it.
    """
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(
            f"Before virtual tokens, masks and labels have the shape (batch, tokens); got {shape}. Static caches make "
            "masks of four dimensions: leave cache_implementation out."
        )
    return mask


def extended(values: Any, count: int, value: int) -> Tensor:
    """Values (batch, tokens) with `count` times `value` in front."""
    values = check(values)
    return torch.cat([values.new_full((len(values), count), value), values], 1)


def padding_first(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """Values in another order: of each row the padding on its left, then the first `count`, then the rest.

    Args:
        values: embeddings (batch, count + tokens, width), or numbers (..., batch or 1, count + tokens).
        mask: that of the tokens alone, (batch, tokens).
        count: how many values stand in front.
    """
    padding = _padding(mask)
    place = torch.arange(count + mask.shape[1], device=mask.device).expand(len(mask), -1)
    source = torch.where(place < padding, place + count, torch.where(place < padding + count, place - padding, place))
    if values.is_floating_point() and values.dim() == 3:
        return values.take_along_dim(source[..., None], 1)
    values = values.expand(*values.shape[:-2], len(mask), -1)
    return values.take_along_dim(source.expand(values.shape), -1)


def real_places(mask: Tensor, count: int) -> Tensor:
    """Where the tokens of the mask (batch, tokens) are after `padding_first`, (batch, tokens)."""
    place = torch.arange(mask.shape[1], device=mask.device).expand(len(mask), -1)
    return torch.where(place < _padding(mask), place, place + count)


def _padding(mask: Tensor) -> Tensor:
    """How many tokens of padding stand on the left of each row, (batch, 1)."""
    return (mask != 0).long().argmax(1)[:, None]


def real_ones(output: Any, kept: Tensor | slice) -> Any:
    """A model's output, of the tokens at the places `kept` alone: their states, and what they attended to."""
    if getattr(output, "last_hidden_state", None) is None:
        raise UserError(
            f"Virtual tokens have to be taken out of the last_hidden_state, but the model gives a "
            f"{type(output).__name__} without one. Choose LoRA instead."
        )
    output.last_hidden_state = _rows(output.last_hidden_state, kept)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(None if state is None else _rows(state, kept) for state in output.hidden_states)
    if getattr(output, "attentions", None) is not None:
        output.attentions = tuple(None if each is None else _queries(each, kept) for each in output.attentions)
    return output


def _rows(states: Tensor, kept: Tensor | slice) -> Tensor:
    return states[:, kept] if isinstance(kept, slice) else states.take_along_dim(kept[..., None], 1)


def _queries(weights: Tensor, kept: Tensor | slice) -> Tensor:
    return weights[:, :, kept] if isinstance(kept, slice) else weights.take_along_dim(kept[:, None, :, None], 2)
