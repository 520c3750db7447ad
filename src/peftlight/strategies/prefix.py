"""Prefix-Tuning: Optimizing Continuous Prompts for Generation.

Xiang Lisa Li, Percy Liang, 2021, https://arxiv.org/abs/2101.00190

The prefix stands before the keys and values of every self-attention, those of T5's encoder and of its decoder; the
cross-attention is left as it is. It has no position, and tokens keep theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from peftlight.attention import check_prefixable
from peftlight.blocks import Attention, blocks_for
from peftlight.delta import Delta
from peftlight.errors import UserError
from peftlight.linear import widths
from peftlight.strategies.prefix_as_peft import DecoderPrefix, later_positions, order_in_t5
from peftlight.strategies.prefix_layers import Prefix, PrefixDelta, ProjectedPrefix, SamePrefix, Trunk
from peftlight.strategy import Adapter, PEFTStrategy


@dataclass
class PrefixTuning(PEFTStrategy):
    """Train keys and values that every token attends to as if they came before its sequence."""

    num_virtual_tokens: int = 20
    """Length of the prefix."""
    prefix_projection: bool = False
    """Whether a network makes the prefix while it is trained, as in the paper; only the prefix it made is saved."""
    encoder_hidden_size: int | None = None
    """Width of that network's hidden layer; none: the width of the keys."""
    compat: Literal["peft"] | None = None
    """peft: HF PEFT's numbers; there the prefix takes positions, and T5 has it in the decoder alone. None: as above."""

    starts_unchanged = False

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise UserError(f"A prefix has at least 1 virtual token; num_virtual_tokens is {self.num_virtual_tokens}.")
        if self.compat not in (None, "peft"):
            raise UserError(f"compat is {self.compat!r}; expected peft, or none at all.")
        if self.encoder_hidden_size is None:
            return
        if self.encoder_hidden_size < 1:
            raise UserError(f"encoder_hidden_size is a width of at least 1; got {self.encoder_hidden_size}.")
        if not self.prefix_projection:
            raise UserError(
                f"encoder_hidden_size is {self.encoder_hidden_size}, but without prefix_projection there is no network "
                "that it could belong to. Set prefix_projection to true, or leave encoder_hidden_size out."
            )

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        found = _self_attentions(model)
        if self.compat is None:
            yield from self._one_each(model, found)
        elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            yield from self._as_peft_in_t5(model, found)
        else:
            yield later_positions(model, self.num_virtual_tokens)
            yield from self._one_each(model, found)

    def finished(self, adapter: Adapter) -> "PrefixTuning":
        return replace(self, prefix_projection=False, encoder_hidden_size=None)

    def _one_each(self, model: nn.Module, attentions: Sequence[Attention]) -> Iterator[tuple[str, Delta]]:
        for attention, prefix in zip(attentions, self._prefixes(model, attentions), strict=True):
            yield attention.core, PrefixDelta(prefix)

    def _as_peft_in_t5(self, model: nn.Module, found: Sequence[Attention]) -> Iterator[tuple[str, Delta]]:
        decoding = [each for each in found if getattr(model.get_submodule(each.core), "is_decoder", False)]
        if not any(hasattr(model.get_submodule(each.core), "relative_attention_bias") for each in decoding):
            raise UserError(
                f"compat: peft knows no model with encoder and decoder but T5; this is a {type(model).__name__}. Leave "
                "compat out."
            )
        prefixes, given = self._prefixes(model, decoding), set[int]()
        for attention, number in zip(decoding, order_in_t5(len(decoding)), strict=True):
            prefix = prefixes[number]
            yield attention.core, DecoderPrefix(SamePrefix(prefix) if number in given else prefix)
            given.add(number)

    def _prefixes(self, model: nn.Module, attentions: Sequence[Attention]) -> list[nn.Module]:
        """One for each attention, all cut out of one table, or one last layer, so that a seed gives HF PEFT's."""
        sizes = [_key_value_widths(model, attention) for attention in attentions]
        length, totals = self.num_virtual_tokens, [sum(pair) for pair in sizes]
        if not self.prefix_projection:
            table = torch.randn(length, sum(totals), dtype=torch.float32, device="cpu")
            return [Prefix(*part.split(pair, 1)) for part, pair in zip(table.split(totals, 1), sizes, strict=True)]
        trunk = Trunk(length, sizes[0][0], self.encoder_hidden_size or sizes[0][0])
        last = nn.Linear(trunk.hidden.out_features, sum(totals), dtype=torch.float32, device="cpu")
        parts = zip(last.weight.split(totals), last.bias.split(totals), sizes, strict=True)
        return [ProjectedPrefix(trunk, weight, bias, pair) for weight, bias, pair in parts]


def _self_attentions(model: nn.Module) -> list[Attention]:
    found = [each for block in blocks_for("PrefixTuning", model) for each in block.attentions if not each.crossed]
    if not found:
        raise UserError(
            f"Prefix tuning changes self-attention, and this {type(model).__name__} has none whose queries, keys and "
            "values come out of linear layers as they are (nn.MultiheadAttention takes them from one weight, DeepSeek "
            "from compressed ones). Choose LoRA instead."
        )
    for attention in found:
        check_prefixable(attention.core, model.get_submodule(attention.core))
    return found


def _key_value_widths(model: nn.Module, attention: Attention) -> tuple[int, int]:
    """The widths of an attention's keys and values, all heads together."""
    if attention.key and attention.value:
        return widths(model.get_submodule(attention.key))[1], widths(model.get_submodule(attention.value))[1]
    config: Any = model.get_submodule(attention.core).config
    total = widths(model.get_submodule(str(attention.fused)))[1]
    heads = config.num_attention_heads
    of_keys = getattr(config, "num_key_value_heads", None) or heads
    if total % (heads + 2 * of_keys):
        raise UserError(
            f"{attention.fused!r} makes {total} features, which do not divide into {heads} heads of queries and "
            f"{of_keys} each of keys and values. Choose LoRA instead."
        )
    width = total // (heads + 2 * of_keys) * of_keys
    return width, width
