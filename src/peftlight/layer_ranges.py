"""Ranges of layers: "last 4", "first 2", "0-3", "5", or a list of numbers."""

import re
from collections.abc import Collection, Sequence

from torch import nn

from peftlight.errors import UserError, listed
from peftlight.paths import own_modules, place_of


def in_layers(model: nn.Module, names: Collection[str], layers: str | list[int]) -> set[str]:
    """Those of the names that lie in the layers asked for, counted in each stack by itself.

    Raises:
        UserError: `layers` is not understood, reaches beyond the stacks, or leaves nothing.
    """
    placed = {name: place for name in names if (place := place_of(name))}
    if not placed:
        raise UserError(f"layers: {layers!r} was given, but what target_modules selects lies in no numbered layer.")
    stacks = dict.fromkeys((stack for stack, _ in placed.values()), 0)
    for stack, index in filter(None, map(place_of, (name for name, _ in own_modules(model)))):
        if stack in stacks:
            stacks[stack] = max(stacks[stack], index + 1)
    longest = max(stacks.values())
    counts = listed(f"{stack or 'top'}: {count}" for stack, count in stacks.items())
    has = f"The model has {longest} layers ({counts})."
    wrong = [index for index in _numbers(layers, longest, has) if not 0 <= index < longest]
    if wrong:
        raise UserError(f"layers: {layers!r} reaches beyond the first or last layer. {has} Counting starts at 0.")
    asked = {stack: set(_numbers(layers, count, has)) for stack, count in stacks.items()}
    kept = {name for name, (stack, index) in placed.items() if index in asked[stack]}
    if not kept:
        there = sorted({index for _, index in placed.values()})
        raise UserError(f"layers: {layers!r} leaves nothing: the modules selected lie in layers {listed(there, 24)}.")
    return kept


def _numbers(layers: str | list[int], count: int, has: str) -> Sequence[int]:
    """The layers asked for, in a stack of `count`; they may lie outside it."""
    if isinstance(layers, str):
        if edge := re.fullmatch(r"\s*(last|first)\s+([1-9]\d*)\s*", layers):
            number = int(edge[2])
            return range(number) if edge[1] == "first" else range(count - number, count)
        if span := re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", layers):
            first, last = int(span[1]), int(span[2] or span[1])
            if first <= last:
                return range(first, last + 1)
    elif layers and all(isinstance(index, int) for index in layers):
        return [index if index >= 0 else count + index for index in layers]
    raise UserError(
        f"layers: {layers!r} is not understood. Expected 'last 4', 'first 2', '0-3', '5', or a list of numbers such as "
        f"[0, -1]. {has}"
    )
