"""Files for the strategies that are not exchanged with HF PEFT, a user's own among them.

The layout is HF PEFT's; the type `PEFTLIGHT_<NAME>` makes HF PEFT refuse them instead of misreading them. The tensors
have the names they have in the model, without the adapter's name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from peftlight.delta import CHILD
from peftlight.errors import UserError
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.strategies.lora import LoRA
from peftlight.strategies.stack import Stack
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.strategy_spec import as_strategy, spec_of

TYPE_PREFIX = "PEFTLIGHT_"


def to_own(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors that describe the adapter."""
    config: Config = {
        "peft_type": _type_of(adapter.strategy),
        "strategy": spec_of(adapter.strategy),
        "trained": adapter.trained,
    }
    named, plain = f"{CHILD}.{adapter.name}.", f"{CHILD}."
    return config, {_renamed(key, named, plain): value for key, value in adapter.state().items()}


def from_own(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that the files describe, to be put on `model` under `name`.

    Raises:
        UserError: the config is not one that `to_own` writes, or names a strategy that is not known.
    """
    trained = config.get("trained")
    if not isinstance(trained, list) or not all(isinstance(entry, str) for entry in trained):
        raise UserError(f"'trained' is {trained!r}; expected a list of names.")
    strategy = strategy_in(config.get("strategy"))
    for part in _parts(strategy):
        if isinstance(part, LoRA):
            part.refuses_wasted_rank = False  # a PiSSA is saved with twice its rank
    if config["peft_type"] != _type_of(strategy):
        raise UserError(f"peft_type is {config['peft_type']!r}, but its strategy is a {type(strategy).__name__}.")
    plain, named = f"{CHILD}.", f"{CHILD}.{name}."
    state = {_renamed(key, plain, named): value for key, value in tensors.items()}
    parts = {name for named in (model.named_modules(), model.named_parameters()) for name, _ in named}
    by_strategy = set(strategy.train(model))
    return Contents(strategy, [entry for entry in trained if entry in parts and entry not in by_strategy], state)


def strategy_in(spec: Any) -> PEFTStrategy:
    """The strategy that a file has as plain data.

    Raises:
        UserError: it is not one that `spec_of` gives, or is not known.
    """
    if not isinstance(spec, Mapping) or not isinstance(spec.get("init_args"), Mapping) or "class_path" not in spec:
        raise UserError(f"'strategy' is {spec!r}; expected a class_path and init_args.")
    return as_strategy(spec)


def _parts(strategy: PEFTStrategy) -> Iterator[PEFTStrategy]:
    """The strategy, or all that a stack holds."""
    if not isinstance(strategy, Stack):
        yield strategy
        return
    for member in strategy.strategies:
        yield from _parts(member)


def _type_of(strategy: PEFTStrategy) -> str:
    return TYPE_PREFIX + type(strategy).__name__.upper()


def _renamed(key: str, old: str, new: str) -> str:
    """The key with `old` exchanged for `new` where it begins the key or follows a dot."""
    if key.startswith(old):
        return new + key[len(old) :]
    return key.replace(f".{old}", f".{new}", 1)
