"""Where an attention of transformers lets its keys and values be changed: after positions and cache, before the scores.

Such an attention looks up the function that computes it by a name in its own config, and calls it with queries, keys,
values and mask. While `prefixed` is entered, the module has a stand-in for its config that names the function below;
it puts the prefix in front and calls the function that the config names. Nothing else learns of the prefix: not the
cache, not the positions, not the model's masks.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.errors import UserError

_NAME = "peftlight_prefix"
_TURNS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""A lock for each attention; several adapters may bring a prefix, so one thread may take it several times."""
_MAKING = threading.Lock()


class _Prefixed:
    """A config that names another attention function and carries the prefix; in all else the one it stands for."""

    _attn_implementation = _NAME

    def __init__(self, replaced: Any, prefix_keys: Tensor, prefix_values: Tensor) -> None:
        self.replaced = replaced
        self.prefix_keys, self.prefix_values = prefix_keys, prefix_values
        self.reached = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.replaced, name)


@contextmanager
def prefixed(module: nn.Module, keys: Tensor, values: Tensor) -> Iterator[None]:
    """Within the block each query of the attention `module` sees the prefix in front of the module's keys and values.

    One thread at a time computes with the module; others wait. Attention weights, where they are asked for, are those
    on the real keys; what is missing to 1 lies on the prefix.

    Args:
        module: an attention that `check_prefixable` lets pass.
        keys: (prefix length, heads of keys * their width), as the attention's function gets them.
        values: (prefix length, heads of values * their width).

    Raises:
        UserError: the attention's function, or what it was asked for, leaves no place for a prefix.
    """
    _register()
    with _turn_of(module):
        config: Any = module.config
        stand_in = _Prefixed(config, keys, values)
        module.config = stand_in  # type: ignore[assignment]  # on this instance; the model's config is another reference
        try:
            yield
        finally:
            module.config = config
    if not stand_in.reached:
        raise UserError(f"{type(module).__name__} computed its attention without the prefix. Choose LoRA instead.")


def _turn_of(module: nn.Module) -> AbstractContextManager[Any]:
    """What a thread holds while the module has a stand-in for its config; traced code does not put one there."""
    if torch.compiler.is_compiling():
        return nullcontext()
    with _MAKING:
        return _TURNS.setdefault(module, threading.RLock())


def check_prefixable(name: str, module: nn.Module) -> None:
    """See that `prefixed` can serve the attention at path `name`.

    Raises:
        UserError: it does not look its function up, or looks up one that takes no prefix.
    """
    looks_it_up = {"ALL_ATTENTION_FUNCTIONS", _own_function(module)} <= set(_forward_of(module).__code__.co_names)
    if "config" not in vars(module) or not looks_it_up:
        raise UserError(
            f"The attention {name!r}, a {type(module).__name__}, takes no prefix: it computes its scores itself. Those "
            "of transformers 5 that look their function up do (BERT, Llama, GPT-2, T5, ViT, ...). Choose LoRA instead."
        )
    _check_function(module, module.config)


def _forward_of(module: nn.Module) -> FunctionType:
    function: FunctionType = inspect.unwrap(type(module).forward)
    return function


def _check_function(module: nn.Module, config: Any) -> None:
    name = config._attn_implementation or "eager"
    if name not in ("eager", "sdpa") and ("flash" not in name or name.startswith("paged|")):
        raise UserError(
            f"The model computes attention with {name!r}, whose mask takes no prefix. Load it with "
            "attn_implementation='sdpa', 'eager' or 'flash_attention_2'."
        )
    if name == "eager" and getattr(module, "reorder_and_upcast_attn", False):
        raise UserError(
            f"reorder_and_upcast_attn makes {type(module).__name__} compute its scores itself, without the prefix. "
            "Set it to False, or load the model with attn_implementation='sdpa'."
        )


def _register() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if _NAME not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention's function with the prefix in front of key and value, each (batch, heads, length, width)."""
    config: Any = module.config
    length = key.shape[2]
    while isinstance(config, _Prefixed):  # nested, where several adapters bring a prefix
        config.reached = True
        key, value = _in_front(config.prefix_keys, key), _in_front(config.prefix_values, value)
        config = config.replaced
    _check_function(module, config)
    added = key.shape[2] - length
    mask = _mask(module, config._attn_implementation, query, length, added, attention_mask, options)
    bias = options.get("position_bias")
    if bias is not None:
        options["position_bias"] = F.pad(bias, (key.shape[2] - bias.shape[-1], 0))
    output, weights = _function(module, config._attn_implementation)(module, query, key, value, mask, **options)
    return output, None if weights is None else weights[..., added:]


def _in_front(prefix: Tensor, real: Tensor) -> Tensor:
    batch, heads, _, width = real.shape
    if prefix.shape[1] != heads * width:
        raise UserError(
            f"The prefix has vectors of {prefix.shape[1]} numbers, but the attention computes with {heads} heads of "
            f"{width}, {heads * width} in all: its keys and values are not what its layers make. Choose LoRA instead."
        )
    split = prefix.view(-1, heads, width).transpose(0, 1).to(real.dtype)
    return torch.cat([split.expand(batch, -1, -1, -1), real], dim=2)


def _mask(
    module: nn.Module, name: str, query: Tensor, length: int, added: int, mask: Tensor | None, options: dict[str, Any]
) -> Tensor | None:
    """The mask with `added` visible columns in front of its `length`; for flash attention it is (batch, length)."""
    if "flash" in (name or ""):
        _check_flash(query, mask, options)
    if mask is None and name == "sdpa" and query.shape[2] > 1 and _is_causal(module, options):
        # Without a mask sdpa counts both from the first: query i sees keys up to i, of which the first are the prefix.
        mask = torch.ones(1, 1, query.shape[2], length, dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    additive = mask.dim() == 4 and mask.is_floating_point()
    return F.pad(mask, (added, 0), value=0.0 if additive else 1.0)


def _is_causal(module: nn.Module, options: dict[str, Any]) -> bool:
    asked = options.get("is_causal")
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def _check_flash(query: Tensor, mask: Tensor | None, options: dict[str, Any]) -> None:
    positions = options.get("position_ids")
    restarted = mask is None and len(query) == 1 and positions is not None and bool((positions.diff(dim=-1) < 0).any())
    given = [name for name in ("sliding_window", "cu_seq_lens_q", "cu_seq_lens_k") if options.get(name) is not None]
    if given or restarted:
        raise UserError(
            f"Flash attention takes no prefix together with {given[0] if given else 'rows packed by position_ids'}. "
            "Load the model with attn_implementation='sdpa'."
        )


def _function(module: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """What the module would have called: the function registered under that name, or for "eager" its file's own."""
    forward = _forward_of(module)
    if name not in (None, "eager"):
        registered: Callable[..., Any] = forward.__globals__["ALL_ATTENTION_FUNCTIONS"][name]
        return registered
    function: Callable[..., Any] = forward.__globals__[str(_own_function(module))]
    return function


def _own_function(module: nn.Module) -> str | None:
    """The name of the function for "eager" that the module's forward speaks of; a file may have several."""
    names = _forward_of(module).__code__.co_names
    return next((name for name in names if name.endswith("eager_attention_forward")), None)
