"""Copies of a task that are made while it is trained, by callbacks that average weights.

Such a copy has its own of what trains, and shares the frozen tensors. A callback goes over the tensors of the copy and
of the task side by side, so the copy shows something for each frozen one: a `StandIn`, which costs nothing, and on
which nothing has an effect. The average of a frozen tensor, rounded, would not be the tensor.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from peftlight.errors import UserError

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule

T = TypeVar("T", bound=Tensor)


class StandIn(Tensor):
    """Stands for a frozen tensor, with its device and format; what is computed with it or written into it is dropped."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name.startswith("_foreach_"):
            return _for_each_other(func, args, kwargs)
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        stand_in = next((value for value in given if isinstance(value, cls)), None)
        if name.endswith("_") and not name.endswith("__"):
            return args[0]
        if any(not isinstance(value, cls) for value in given):
            return stand_in
        with torch._C.DisableTorchFunctionSubclass():
            value = func(*args, **kwargs)
        return stand_in if isinstance(value, Tensor) else value


def _for_each_other(func: Callable[..., Any], args: Sequence[Any], kwargs: Any) -> Any:
    """The operation on lists of tensors, on those places where none of the lists has a stand-in."""
    lists = [value for value in args if isinstance(value, list | tuple)]
    places = list(zip(*lists, strict=True))
    kept = [number for number, place in enumerate(places) if not any(isinstance(each, StandIn) for each in place)]
    fewer = [[value[number] for number in kept] if isinstance(value, list | tuple) else value for value in args]
    found = func(*fewer, **kwargs) if kept else []
    if func.__name__.endswith("_"):
        return None
    by_place = dict(zip(kept, found, strict=True))
    return [by_place.get(number, next((each for each in place if isinstance(each, StandIn)), None))
            for number, place in enumerate(places)]  # fmt: skip


def copied(module: "PEFTModule", memo: dict[int, Any]) -> "PEFTModule":
    """A deep copy of a task in training, which shares the frozen tensors with it.

    Raises:
        UserError: there is nothing to copy yet, or it will be sharded.
    """
    if module.adapter is None:
        raise UserError("The task was copied before its base was loaded, so the copy would hold nothing. Copy it in a "
                        "callback's setup or later, and load no model in the task's own setup.")  # fmt: skip
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        raise UserError("Under fsdp2 a task cannot be copied: the copy would not be sharded. Choose ddp.")
    own = own_tensors(module)
    for name, tensor in _tensors(module):
        if name not in own:
            memo[id(tensor)] = tensor
            memo.update({id(part): part for part in getattr(tensor, "__dict__", {}).values()})  # scales of packed ones
    memo.update({id(value): value for value in module.adapter.originals.values()})
    made: PEFTModule = type(module).__new__(type(module))
    memo[id(module)] = made
    made.__setstate__(copy.deepcopy(module.__getstate__(), memo))
    made.own_in_copy = own
    return made


def own_tensors(module: "PEFTModule") -> frozenset[str]:
    """Names in the task of all that trains or is saved."""
    return frozenset(module.own_state() | {name for name, p in module.named_parameters() if p.requires_grad})


def shown(named: Iterator[tuple[str, T]], own: frozenset[str], prefix: str) -> Iterator[tuple[str, T]]:
    """Names and tensors of a copy, with a stand-in for each that it shares."""
    prefix = f"{prefix}." if prefix else ""
    stand_ins: dict[tuple[torch.dtype, torch.device], Any] = {}
    for name, tensor in named:
        if name.removeprefix(prefix) in own:
            yield name, tensor
            continue
        kind = tensor.dtype, tensor.device
        if kind not in stand_ins:
            stand_ins[kind] = torch.empty(0, dtype=tensor.dtype, device=tensor.device).as_subclass(StandIn)
        yield name, stand_ins[kind]


def move_own(module: "PEFTModule", own: frozenset[str], move: Callable[[Tensor], Tensor]) -> None:
    """Move what a copy has for itself; what it shares stays with the task."""
    for name in own:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(tensor := getattr(owner, leaf), nn.Parameter):
            tensor.data = move(tensor.data)
        else:
            owner._buffers[leaf] = move(tensor)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
