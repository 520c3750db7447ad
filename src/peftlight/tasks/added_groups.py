"""Groups of parameters that come to an optimizer in mid-run, and the schedules that were made before them."""

from collections.abc import Mapping, Sequence
from typing import Any

_RATES = ("base_lrs", "max_lrs")
_OTHERS = ("lr_lambdas", "min_lrs", "base_momentums", "max_momentums")
"""Lists with a value for each group, by the names that torch's schedules give them."""


def reference(groups: Sequence[Mapping[str, Any]]) -> int:
    """The number of the group to which the rates of added ones keep their proportion: the first that has one."""
    return next((number for number, group in enumerate(groups) if group.get("initial_lr", group["lr"])), 0)


def share_of_rate(group: Mapping[str, Any], first: Mapping[str, Any]) -> float:
    """What the group's learning rate is to the first group's, at a moment when that is 0 too."""
    if first["lr"]:
        return float(group["lr"] / first["lr"])
    at_start = first.get("initial_lr", 0.0)
    return float(group.get("initial_lr", group["lr"]) / at_start) if at_start else 1.0


def follow(scheduler: Any) -> None:
    """Have a schedule move the groups that its optimizer got since it was made; nothing where there are none.

    A new group keeps the proportion that its learning rate has to the first group's: a schedule that halves the one
    halves the other. torch's own schedules end in an error there.
    """
    for inner in getattr(scheduler, "_schedulers", ()):
        follow(inner)
    per_group = [value for name in (*_RATES, *_OTHERS) if isinstance(value := getattr(scheduler, name, None), list)]
    groups = scheduler.optimizer.param_groups
    known = min(map(len, per_group), default=len(groups))
    number = reference(groups[:known])
    first = groups[number]
    for group in groups[known:]:
        share = share_of_rate(group, first)
        for key in first.keys() - group.keys():
            group[key] = first[key] * share if key.endswith("lr") else first[key]
        for name in (*_RATES, *_OTHERS):
            if isinstance(values := getattr(scheduler, name, None), list) and len(values) < len(groups):
                values.append(values[number] * share if name in _RATES else values[number])
