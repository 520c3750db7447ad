"""Where HF PEFT's prefix differs: it lies in the cache, so that tokens are counted as if it were tokens before them."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.strategies.prefix_layers import PrefixDelta


class LaterPositions(Delta):
    """Position p becomes p + by, on the module that makes the positions."""

    def __init__(self, by: int, names: list[str], limit: int | None) -> None:
        """
        Args:
            by: the length of the prefix.
            names: the module's inputs in order.
            limit: how many positions the model has; None: any number.
        """
        super().__init__()
        self.by, self.names, self.limit = by, names, limit

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if given.get("position_ids") is not None:
            return base(**given | {"position_ids": given["position_ids"] + self.by})
        tokens: Tensor = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
        self.check_length(tokens.shape[1])
        if "past_key_values_length" in self.names:
            return base(**given | {"past_key_values_length": given.get("past_key_values_length", 0) + self.by})
        cache = given.get("past_key_values")
        seen = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(tokens.shape[1], device=tokens.device) + seen + self.by
        return base(**given | {"position_ids": positions.unsqueeze(0)})

    def check_length(self, tokens: int) -> None:
        if self.limit is not None and tokens + self.by > self.limit:
            raise UserError(
                f"A row of {tokens} tokens after a prefix of {self.by} needs {tokens + self.by} positions; the model "
                f"has {self.limit}. Cut the rows to {self.limit - self.by} tokens (data.max_length), or leave compat "
                "out: then a prefix takes no positions."
            )


def later_positions(model: nn.Module, by: int) -> tuple[str, Delta]:
    """Path of the module that makes the positions of `model`, and the delta that counts them from `by` on.

    Raises:
        UserError: HF PEFT could not serve the model either, or the prefix leaves no position.
    """
    backbone: nn.Module = getattr(model, "base_model", model)
    if "past_key_values" not in _inputs(backbone):
        raise UserError(
            f"compat: peft cannot serve this {type(model).__name__}: HF PEFT puts the prefix into the cache of keys "
            "and values, and it has none. Leave compat out."
        )
    if getattr(getattr(model, "config", None), "sliding_window", None) is not None:
        raise UserError(
            f"compat: peft cannot serve this {type(model).__name__}: its attention has a sliding window, out of which "
            "HF PEFT's prefix slides in long rows. Leave compat out: then every token sees the prefix."
        )
    paths = {module: name for name, module in model.named_modules()}
    site = next((module for module in paths if "past_key_values_length" in _inputs(module)), backbone)
    if "position_ids" not in _inputs(site):
        raise UserError(f"compat: peft finds no positions in this {type(model).__name__}. Leave compat out.")
    limit = _learned_positions(site)
    if limit is not None and by >= limit:
        raise UserError(
            f"num_virtual_tokens is {by}, and the model has {limit} positions, which with compat: peft the prefix "
            f"takes too: at most {limit - 1} leave room for a token."
        )
    return paths[site], LaterPositions(by, _inputs(site), limit)


def _inputs(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def _learned_positions(site: nn.Module) -> int | None:
    """How many positions a token may have, or None where they are computed."""
    for name, module in site.named_children():
        if isinstance(module, nn.Embedding) and ("position" in name or name == "wpe"):
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


class DecoderPrefix(PrefixDelta):
    """As `PrefixDelta`, in T5's decoder, with the biases of relative positions that tokens before it would have."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        module: Any = base.module
        if module.has_relative_attention_bias and kwargs.get("position_bias") is None:
            kwargs["position_bias"] = self._bias(module, args[0] if args else kwargs["hidden_states"], kwargs)
        return super().forward(base, *args, **kwargs)

    def _bias(self, module: Any, states: Tensor, given: dict[str, Any]) -> Tensor:
        """(1, heads, length of `states`, prefix and keys); this layer hands it on to those after it."""
        cache, mask, length = given.get("past_key_values"), given.get("mask"), len(self.prefix()[0])
        seen = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        keys = seen + states.shape[1] if mask is None else mask.shape[-1]
        bias: Tensor = module.compute_bias(states.shape[1], length + keys, states.device, length + seen)
        return bias


def order_in_t5(layers: int) -> list[int]:
    """For each layer of the decoder, the number of the prefix that it gets: with an even count two layers share one."""
    return [2 * layer % layers for layer in range(layers)]
