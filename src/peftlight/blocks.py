"""A model's repeated blocks by structure: which of their layers make queries, keys and values, and which write back.

No names of architectures stand here. A block is an entry of a numbered stack; in it, what lies below a module that
speaks of attention is an attention, and the other linear layers are the feed-forward part.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from peftlight.errors import UserError
from peftlight.linear import is_linear, widths
from peftlight.paths import heads_of, own_modules, place_of

_ROLES = {"query": r"q|query|q_.*|query_.*", "key": r"k|key|k_.*|key_.*", "value": r"v|value|v_.*|value_.*"}


@dataclass(frozen=True)
class Attention:
    """Paths of one attention; the layers of self-attention come before those of cross-attention in a block."""

    core: str
    """The module whose forward computes the attention: the parent of its query layer."""
    query: str | None
    key: str | None
    value: str | None
    fused: str | None
    """The layer that makes queries, keys and values at once, where there is one; then the three above are None."""
    output: str
    """The linear layer that writes the result back to the stream."""
    crossed: bool
    """Whether keys and values come from another sequence."""


@dataclass(frozen=True)
class FeedForward:
    """Paths of the linear layers of a feed-forward part."""

    inputs: tuple[str, ...]
    """Those that read the stream: one, or two where it is gated."""
    output: str
    """The one that writes the result back to the stream."""


@dataclass(frozen=True)
class Block:
    """One entry of a stack."""

    path: str
    attentions: tuple[Attention, ...]
    feed_forward: FeedForward | None


def blocks_of(model: nn.Module) -> list[Block]:
    """The blocks in the order of the model; parts that have neither attention nor feed-forward layers are left out.

    Raises:
        UserError: there is none.
    """
    modules, heads = dict(own_modules(model)), heads_of(model)
    names = [
        name
        for name, module in modules.items()
        if is_linear(module) and not any(f"{name}.".startswith(f"{head}.") for head in heads)
    ]
    blocks = _blocks("", names, modules)
    if not blocks:
        raise UserError(f"This {type(model).__name__} has no stack of blocks with attention or feed-forward layers.")
    return blocks


def blocks_for(method: str, model: nn.Module) -> list[Block]:
    """The blocks, for the method of that name, which cannot do without them.

    Raises:
        UserError: there is none; the message says what to choose instead.
    """
    try:
        return blocks_of(model)
    except UserError as error:
        raise UserError(
            f"{method} changes blocks of attention and feed-forward layers. {error} Choose LoRA instead, which adapts "
            "linear layers and convolutions wherever they are."
        ) from None


def _blocks(stack: str, names: Sequence[str], modules: dict[str, nn.Module]) -> list[Block]:
    """The blocks in the first numbered stack below `stack`; where an entry holds stacks of blocks itself, those."""
    grouped: dict[str, list[str]] = {}
    for name in names:
        if place := place_of(name.removeprefix(stack)):
            grouped.setdefault(f"{stack}{place[0]}.{place[1]}".lstrip("."), []).append(name)
    blocks: list[Block] = []
    for path, inside in grouped.items():
        block = _block(path, inside, modules)
        stacked = sum(not attention.crossed for attention in block.attentions) > 1
        blocks += _blocks(f"{path}.", inside, modules) if stacked else [block]
    return [block for block in blocks if block.attentions or block.feed_forward]


def _block(path: str, names: Sequence[str], modules: dict[str, nn.Module]) -> Block:
    roots = {name: _attention_root(name, path, modules) for name in names}
    found = (
        _attention([name for name in names if roots[name] == root], root, path)
        for root in dict.fromkeys(filter(None, roots.values()))
    )
    attentions = sorted(filter(None, found), key=lambda attention: attention.crossed)
    return Block(path, tuple(attentions), _feed_forward([name for name in names if roots[name] is None], modules))


def _attention_root(name: str, block: str, modules: dict[str, nn.Module]) -> str | None:
    """The outermost module within the block that speaks of attention and holds the layer, or None."""
    parts = name.removeprefix(block).lstrip(".").split(".")
    for depth in range(1, len(parts)):
        path = ".".join(filter(None, [block, *parts[:depth]]))
        words = f"{parts[depth - 1]} {type(modules[path]).__name__}".lower()
        if re.search("attention|attn", words):
            return path
    return None


def _attention(names: Sequence[str], root: str, block: str) -> Attention | None:
    roles: dict[str, str | None] = {role: _first(names, pattern) for role, pattern in _ROLES.items()}
    separate = all(roles.values())
    fused = None if separate else next((name for name in names if re.search("qkv|c_attn|query_key_value", name)), None)
    source = roles["query"] if separate else fused
    if source is None:
        return None
    core = source.rpartition(".")[0]
    crossed = re.search("cross|enc_?dec|encoder_attn", f"{root}.{core}".replace(block, "").lower()) is not None
    kept = roles if separate else dict.fromkeys(roles)
    sources = {fused, *kept.values()}
    output = next((name for name in reversed(names) if name not in sources), None)
    return (
        None if output is None else Attention(core, kept["query"], kept["key"], kept["value"], fused, output, crossed)
    )


def _first(names: Iterable[str], pattern: str) -> str | None:
    return next((name for name in names if re.fullmatch(pattern, name.rpartition(".")[2])), None)


def _feed_forward(names: Sequence[str], modules: dict[str, nn.Module]) -> FeedForward | None:
    """The last layer writes back; those that read as many features as it writes are the inputs."""
    plain = [name for name in names if not re.search("expert|router|gate$", name)]
    if len(plain) < 2:
        return None
    width = widths(modules[plain[-1]])[1]
    inputs = tuple(name for name in plain[:-1] if widths(modules[name])[0] == width)
    return FeedForward(inputs, plain[-1]) if inputs else None
