"""Prefix tuning in HF PEFT's files: pure translations, both ways.

The table there is (virtual tokens, 2 layers width), for each layer its keys and then its values. HF PEFT puts them into
the cache, where they take positions. So an adapter that is read has `compat: peft`. By our conventions a prefix takes
none, which has an equal there only where positions turn queries and keys by angles that add: its keys are turned by the
prefix's length, and turned back where the record beside the files says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD, Delta
from peftlight.errors import UserError
from peftlight.interop import own_format
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf.prompt_learning import Hints, check, differing, read, recorded_beside, task_for, written
from peftlight.strategies.prefix import PrefixTuning
from peftlight.strategies.prefix_as_peft import DecoderPrefix, order_in_t5
from peftlight.strategies.prefix_layers import Prefix, PrefixDelta
from peftlight.strategy import Adapter

_HINTS: Hints = {"prefix_projection": bool, "encoder_hidden_size": int, "init_weights": str}
"""Fields about how the prefix was made, which no longer matters."""
_TURNING = {"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "olmo", "olmo2", "granite", "phi3"}
"""Types of models in which a position does nothing but to turn the halves of each head's queries and keys."""
_FIXED_ANGLES = {"default", "linear", "llama3", "yarn"}
"""Kinds of angles that are the same in rows of any length."""


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what a finished adapter does; ours where it cannot."""
    strategy, layout = adapter.strategy, _Layout.of(adapter.sites)
    assert isinstance(strategy, PrefixTuning)
    angles = _angles(adapter.model) if strategy.compat is None else None
    if _obstacle(adapter.model, layout) or (strategy.compat is None and angles is None):
        return own_format.to_own(adapter)
    count = strategy.num_virtual_tokens
    pairs = [torch.zeros(count, 2 * layout.width)] * layout.layers  # and so they stay where T5 reads none
    for number, (_, prefix) in layout.slots.items():
        keys, values = prefix.keys.detach(), prefix.values.detach()
        pairs[number] = torch.cat([keys if angles is None else _turned(keys, count * angles), values], 1)
    table = torch.cat([pair.to(pairs[0]) for pair in pairs], 1)
    sizes = {"num_virtual_tokens": count, "token_dim": layout.width, "num_attention_heads": _heads(adapter.model)}
    return written(adapter, "PREFIX_TUNING", table, sizes)


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that HF PEFT's files describe, to be put on `model` under `name`.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    parts = read(config, tensors, model, _HINTS)
    strategy, columns = PrefixTuning(parts.count, compat="peft"), parts.table.shape[1]
    with torch.random.fork_rng(devices=[]):
        layout = _Layout.of(dict(strategy.deltas(model)))
    if obstacle := _obstacle(model, layout):
        raise UserError(f"HF PEFT's prefix on this {type(model).__name__} is not known here: {obstacle}.")
    expected = 2 * layout.layers * layout.width
    if columns != expected:
        parts.problems.append(
            f"prompt_embeddings has {columns} columns; keys and values of {layout.layers} layers with {layout.width} "
            f"each need {expected}"
        )
    sizes = {"num_layers": layout.layers, "num_attention_heads": _heads(model), "token_dim": layout.width}
    check([*parts.problems, *differing(config, sizes)], model)
    state, slots = parts.state, parts.table.view(parts.count, -1, layout.width)
    for number, (site, _) in layout.slots.items():
        path = f"{site}.{CHILD}.{name}.prefix."
        state |= {f"{path}keys": slots[:, 2 * number], f"{path}values": slots[:, 2 * number + 1]}
    return Contents(strategy, parts.heads, state)


def as_recorded(contents: Contents, spec: Mapping[str, Any], model: nn.Module, name: str = "default") -> Contents:
    """What `from_peft` gave, by the conventions of the strategy that our record beside the files names.

    Raises:
        UserError: the record is of another adapter.
    """
    strategy = contents.strategy
    assert isinstance(strategy, PrefixTuning)
    recorded, angles, state = recorded_beside(strategy, spec), _angles(model), dict(contents.state)
    if recorded.compat:
        return replace(contents, strategy=recorded)
    if angles is None:
        raise UserError(
            f"The record is of {recorded}, which on a {type(model).__name__} has no equal in HF PEFT's files."
        )
    for key in (key for key in state if key.endswith(f".{CHILD}.{name}.prefix.keys")):
        state[key] = _turned(state[key], -strategy.num_virtual_tokens * angles)
    return replace(contents, strategy=recorded, state=state)


@dataclass(frozen=True)
class _Layout:
    """Which attention has which place in the table."""

    slots: dict[int, tuple[str, Prefix]]
    """By the place: the path of the attention, or of the first of those that share it, and its prefix."""
    layers: int
    """How many places there are."""

    @classmethod
    def of(cls, sites: Mapping[str, Delta]) -> "_Layout":
        found = [(site, delta) for site, delta in sites.items() if isinstance(delta, PrefixDelta)]
        shared = any(isinstance(delta, DecoderPrefix) for _, delta in found)
        order = order_in_t5(len(found)) if shared else range(len(found))
        pairs = [(number, site, delta.prefix) for number, (site, delta) in zip(order, found, strict=True)]
        return cls({n: (site, prefix) for n, site, prefix in pairs if isinstance(prefix, Prefix)}, len(found))

    @property
    def widths(self) -> set[int]:
        """Those of the keys and values of all layers."""
        return {tensor.shape[1] for _, prefix in self.slots.values() for tensor in prefix()}

    @property
    def width(self) -> int:
        (width,) = self.widths
        return width


def _obstacle(model: nn.Module, layout: _Layout) -> str | None:
    """Why HF PEFT cannot put a prefix before this model's keys, or does with it what is not known here."""
    if task_for(model) is None:
        return "it has no task for the model"
    config = _text_config(model)
    if window := getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None):
        return f"there it slides out of the model's window of {window} tokens, and ours never does"
    if len(layout.widths) != 1:
        return f"it needs keys and values of one width, and they have {sorted(layout.widths)}"
    if layout.layers != getattr(config, "num_hidden_layers", None):
        return f"it makes one for each of num_hidden_layers, and {layout.layers} layers take one"
    return None


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, "text_config", config)


def _heads(model: nn.Module) -> int:
    """How many heads keys and values have."""
    config = _text_config(model)
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def _angles(model: nn.Module) -> Tensor | None:
    """By how much one position turns each pair of features (width of a head / 2); None where it is not that simple."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in _TURNING:
        return None
    rotary: Any = next(module for name, module in model.named_modules() if name.endswith("rotary_emb"))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    simple = rotary.rope_type in _FIXED_ANGLES and 2 * len(rotary.inv_freq) == width
    return rotary.inv_freq.double() if simple else None


def _turned(keys: Tensor, angles: Tensor) -> Tensor:
    """[x cos a - y sin a, y cos a + x sin a] for the halves x and y of each head's keys (tokens, heads width).

    A query at position p + n that is turned by a(p + n) meets a key turned by a(n) as it meets the unturned key at p.
    It is in float64, so that keys in float32 that are turned and turned back are the same bits.
    """
    first, second = keys.double().unflatten(1, (-1, 2, len(angles))).unbind(2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([first * cos - second * sin, second * cos + first * sin], 2).flatten(1)
