"""Where the tokens of a model come in, found by structure, and the deltas that put virtual tokens before them."""

import inspect
from collections.abc import Iterator
from typing import Any, Literal

from torch import nn

from peftlight.delta import Delta
from peftlight.errors import UserError
from peftlight.paths import input_embedding
from peftlight.virtual_tokens import (
    DecoderSeesThem,
    EncoderVirtualTokens,
    Entrance,
    LayersWithoutThem,
    PoolerWithoutThem,
    VirtualTokens,
    WholeModelVirtualTokens,
)

Compat = Literal["peft"]

_OTHER_CACHES = {"cache_params", "state", "mems", "past_buckets_states"}


def entrance_of(model: nn.Module, method: str, compat: Compat | None = None) -> Entrance:
    """The place where `method`, for the error's text, puts virtual tokens before the real ones.

    Raises:
        UserError: the model has no embeddings of tokens, or its cache is not one of keys and values.
    """
    path = _backbone(model)
    if decoder_of(model):
        path = f"{path}.encoder".lstrip(".")
    elif compat == "peft":
        path = ""
    module = model.get_submodule(path)
    names, table = _input_names(module), _table(module)
    if table is None or not {"input_ids", "inputs_embeds"} <= set(names):
        raise UserError(
            f"{method} puts vectors before the embeddings of tokens, and this {type(model).__name__} has no place for "
            "that: its backbone does not take input_ids and inputs_embeds. Choose LoRA instead."
        )
    if other := _OTHER_CACHES & set(names):
        raise UserError(
            f"{method} leaves its vectors in a cache of keys and values, and this {type(model).__name__} has another "
            f"({', '.join(other)}). Choose LoRA instead."
        )
    first = _first_position(module)
    embedding = module.get_submodule(table)
    assert isinstance(embedding, nn.Embedding)
    return Entrance(path, names, table, embedding.embedding_dim, first, _positions(module, first))


def decoder_of(model: nn.Module) -> str | None:
    """Path of the decoder, in a model whose encoder takes in the tokens; otherwise None."""
    path = _backbone(model)
    children = dict(model.get_submodule(path).named_children())
    if "encoder" not in children or "decoder" not in children:
        return None
    reads = "encoder_hidden_states" in _input_names(children["decoder"])
    return f"{path}.decoder".lstrip(".") if reads else None


def check_count(count: int, entrance: Entrance, method: str) -> None:
    """
    Raises:
        UserError: so many virtual tokens leave no position for a real one.
    """
    if entrance.positions is not None and count >= entrance.positions:
        raise UserError(
            f"{method}: num_virtual_tokens is {count}, but the model has {entrance.positions} positions for virtual "
            f"and real tokens together. Set it to less than {entrance.positions}; rows keep what it leaves."
        )


def deltas_for(
    model: nn.Module, prompt: nn.Module, count: int, entrance: Entrance, compat: Compat | None
) -> Iterator[tuple[str, Delta]]:
    """Pairs (module name, delta) that put the `count` vectors of `prompt` before the real tokens."""
    decoder = decoder_of(model)
    if decoder:
        behind = compat is None
        yield entrance.path, EncoderVirtualTokens(prompt, count, entrance, behind)
        yield decoder, DecoderSeesThem(count, _input_names(model.get_submodule(decoder)), behind)
    elif compat == "peft":
        yield entrance.path, WholeModelVirtualTokens(prompt, count, entrance)
    else:
        # A pooler takes the first of all tokens that are not virtual, so these stand in front of padding too.
        pooler = list(_for_pooler(model, entrance.path, count))
        yield entrance.path, VirtualTokens(prompt, count, entrance, behind_padding=not pooler)
        yield from pooler


def _for_pooler(model: nn.Module, path: str, count: int) -> Iterator[tuple[str, Delta]]:
    """A pooler inside the backbone; where that is a bare layer, the backbone has taken the first token before."""
    children = dict(model.get_submodule(path).named_children())
    if "pooler" not in children:
        return
    if not isinstance(children["pooler"], nn.Linear):
        yield f"{path}.pooler".lstrip("."), PoolerWithoutThem(count)
        return
    if "encoder" not in children:
        raise UserError(f"This {type(model).__name__} pools the first token in a way that is not known.")
    yield f"{path}.encoder".lstrip("."), LayersWithoutThem(count)


def _backbone(model: nn.Module) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def _input_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


def _table(module: nn.Module) -> str | None:
    """Path of the embedding of tokens, from `module`."""
    table = input_embedding(module)
    paths = (name for name, other in module.named_modules() if other is table)
    return next(paths, None) if isinstance(table, nn.Embedding) else None


def _first_position(module: nn.Module) -> int:
    """RoBERTa and its relatives count from the position after that of padding."""
    tables = (m for name, m in module.named_modules() if "position" in name and isinstance(m, nn.Embedding))
    return next((table.padding_idx + 1 for table in tables if table.padding_idx is not None), 0)


def _positions(module: nn.Module, first: int) -> int | None:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    most = getattr(config, "max_position_embeddings", None)
    return most - first if isinstance(most, int) and most > 0 else None
