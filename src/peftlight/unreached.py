"""Trained tensors that a loss does not depend on: which of them may stay as they are, and what the others' user does.

A model may have parameters that no forward reads (DINOv2's mask token, a pooler that a task does not use), or that a
batch does not need (an expert that no token was sent to). Where nobody asked for them by name, as in full fine-tuning,
that is no fault: they get no gradient and stand still until a step reaches them.
"""

from collections.abc import Collection
from typing import Any

from peftlight.candidates import PRESETS
from peftlight.errors import listed
from peftlight.paths import inside
from peftlight.strategy import Adapter
from peftlight.targets import matching

_OPTIONS = ("target_modules", "exclude_modules", "layers", "modules_to_save")
"""Fields of strategies by which modules are left out."""


def may_stay(adapter: Adapter, dead: Collection[str]) -> set[str]:
    """Those of the dead tensors that were not asked for by name, and belong to a strategy that trains others."""
    heads = {name for name in dead if inside(name, adapter.heads)}
    return {name for part in adapter.parts for name in _staying(part, dead, heads)}


def what_to_do(adapter: Adapter, dead: Collection[str]) -> str:
    """How the dead tensors are left out, by the options that this strategy has."""
    fields = {field for part in adapter.parts for field in _OPTIONS if _offers(part.strategy, field)}
    options = [field for field in _OPTIONS if field in fields]
    if any(inside(name, adapter.heads) for name in dead):
        options.append("trained_modules")
    if not options:
        return f"{type(adapter.strategy).__name__} has no option that leaves them out: choose another strategy."
    return f"Leave their modules out ({', '.join(options)})."


def _offers(strategy: Any, field: str) -> bool:
    """Whether the field is there; `modules_to_save`, which only names what is trained, leaves out what it names."""
    return hasattr(strategy, field) and (field != "modules_to_save" or bool(strategy.modules_to_save))


def stays_as_it_is(names: Collection[str], all_of_them: int) -> str:
    """What a person is told of tensors that stay."""
    return (
        f"{len(names)} of {all_of_them} trained tensors had no gradient in the first step, for the loss does not "
        f"depend on them: {listed(sorted(names))}. They stay as they are, unless a later step reaches them."
    )


def _staying(part: Adapter, dead: Collection[str], heads: Collection[str]) -> set[str]:
    strategy: Any = part.strategy
    asked_for = matching(part.model, getattr(strategy, "modules_to_save", []))
    own = part.parameters().keys()
    mine = {name for name in own & set(dead) if not inside(name, asked_for)}
    if "" not in part.trained:  # else the strategy trains the heads itself, with all else
        mine -= set(heads)
    if not own - set(dead) - set(heads):
        return set()
    sites = {name: part.site_of(name) for name in mine}
    alive = {part.site_of(name) for name in own - set(dead)} - {None}
    by_name = getattr(strategy, "target_modules", None) not in (None, *PRESETS)
    return {name for name, site in sites.items() if site is None or not (by_name or site in alive)}
