"""Copies of a task that are made while it is trained, by callbacks that average weights.

Such a copy has its own of what trains, and shares the frozen parameters. It computes with all of them; but whoever goes
over its tensors, to average them, meets a `StandIn` for each frozen one, which costs nothing, and on which nothing has
an effect: the average of a frozen tensor, rounded, would not be the tensor.
"""

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from peftlight.errors import UserError

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


class StandIn(Tensor):
    """Stands for a frozen tensor, with its device and format; what is computed with it or written into it is lost."""

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
        return value.as_subclass(cls) if isinstance(value, Tensor) else value


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


class Shown(dict[str, Any]):
    """The parameters or buffers of a module in a copy: who asks for one by its name gets it; a list has stand-ins."""

    def __init__(self, real: dict[str, Any], frozen: set[str], stand_ins: dict[int, StandIn]) -> None:
        """
        Args:
            real: the module's own.
            frozen: names of those that do not train.
            stand_ins: by the tensor's identity, of the whole copy: what is tied has one.
        """
        super().__init__(real)
        self._frozen, self._stand_ins = frozen, stand_ins

    def items(self) -> Any:
        return [(name, self._shown(name, value)) for name, value in super().items()]

    def values(self) -> Any:
        return [value for _, value in self.items()]

    def __setitem__(self, name: str, value: Any) -> None:
        """A stand-in that was moved has its buffer follow."""
        super().__setitem__(name, self[name].to(value.device) if isinstance(value, StandIn) else value)

    def __reduce__(self) -> Any:
        return dict, (dict(super().items()),)

    def _shown(self, name: str, value: Any) -> Any:
        if name not in self._frozen or value is None:
            return value
        known = self._stand_ins.get(id(value))
        if known is None or known.device != value.device:
            known = torch.empty(0, dtype=value.dtype, device=value.device).as_subclass(StandIn)
            self._stand_ins[id(value)] = known
        return known


def copied(module: "PEFTModule", memo: dict[int, Any]) -> "PEFTModule":
    """A deep copy of a task in training, which shares the frozen parameters with it.

    Raises:
        UserError: there is nothing to copy yet, or it will be sharded.
    """
    if module.adapter is None:
        raise UserError("The task was copied before its base was loaded, so the copy would hold nothing. Copy it in a "
                        "callback's setup or later.")  # fmt: skip
    if isinstance(module.trainer.strategy, ModelParallelStrategy):
        raise UserError("Under fsdp2 a task cannot be copied: the copy would not be sharded. Choose ddp.")
    module.unfreezing.copied = True
    own = module.own_state() | {name for name, p in module.named_parameters() if p.requires_grad}
    for name, parameter in module.named_parameters():
        if name not in own:
            memo[id(parameter)] = parameter
            memo.update({id(part): part for part in vars(parameter).values()})  # the scales of a packed one
    memo.update({id(value): value for value in module.adapter.originals.values()})
    made: PEFTModule = type(module).__new__(type(module))
    memo[id(module)] = made
    made.__setstate__(copy.deepcopy(module.__getstate__(), memo))
    _show(made, own)
    return made


def _show(made: "PEFTModule", own: set[str]) -> None:
    tensors = [*made.named_parameters(), *made.named_buffers()]
    trained, stand_ins = {id(tensor) for name, tensor in tensors if name in own}, dict[int, StandIn]()
    for module in made.modules():
        for kind in ("_parameters", "_buffers"):
            held: dict[str, Any] = vars(module)[kind]
            if frozen := {name for name, tensor in held.items() if id(tensor) not in trained}:
                vars(module)[kind] = Shown(held, frozen, stand_ins)
