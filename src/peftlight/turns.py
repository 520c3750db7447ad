"""One thread at a time changes what a model computes with, and none computes with a model that another one changes.

Which adapters are on stands on the model itself, and all threads share it. A thread that switches takes a turn; others
that want one wait. A thread that only computes takes none, so that this costs nothing there; should it meet a switch,
one of the two gets an error in place of a wrong result. Tasks of asyncio are told apart as threads are.
"""

import asyncio
import gc
import sys
import threading
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from peftlight.delta import ADAPTERS
from peftlight.errors import UserError
from peftlight.wrappers import seen_through

_CALLS = {"_call_impl", "_wrapped_call_impl", "generate"}
"""Functions that compute with the module that is their `self`."""
_OURS = "peftlight-"
"""How the names of the framework's own threads begin, which compute nothing."""
_ADVICE = (
    "Let each thread compute within `with adapters.using(name):` or `with adapters.rows(names):` of one "
    "peftlight.Adapters, which wait for each other; or switch and compute in one thread alone."
)

Choice = tuple[Hashable, ...]
"""The adapters that a model computes with."""


class _Turns:
    """Whose turn it is on one model, and what each thread has chosen last."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.owner: Any = None
        self.waiting: set[int] = set()
        self.chosen: WeakKeyDictionary[Any, Choice] = WeakKeyDictionary()
        self.checks = False
        """Whether each call of the model looks at what its thread has chosen: several threads have."""


_TURNS: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_MAKING = threading.Lock()
_NUMBERS = count()
_OPEN: dict[int, Any] = {}
"""Whose the open turns are, by number: a hook that held a lock would keep the model from being copied."""


@contextmanager
def turn(model: nn.Module, *, chooses: bool = False, short: bool = False) -> Iterator[None]:
    """Within the block this thread alone computes with the model and changes it; others that ask for a turn wait.

    Args:
        model: whose adapters are switched.
        chooses: whether the thread says with it what the model computes with from now on. If another thread switches
            later, the model does not compute for this one before it has chosen again.
        short: whether nothing of a user's own runs within the block.

    Raises:
        UserError: another thread computes with the model right now. Within the block, whoever calls the model from
            another thread gets such an error.
    """
    turns, me = _turns_of(model), _who()
    if turns.owner is me:
        yield
        return
    _take(turns)
    turns.owner = me
    try:
        if short and threading.active_count() == 1:
            yield
        else:
            with _for_others(model, me):
                _refuse_half_done(model, turns)
                yield
    finally:
        if chooses or me in turns.chosen:
            turns.chosen[me] = _in_use(model)
        if len(turns.chosen) > 1 and not turns.checks:
            turns.checks = True
            model.register_forward_pre_hook(_refuse_other_choice, prepend=True)
        turns.owner = None
        turns.lock.release()


def _turns_of(model: nn.Module) -> _Turns:
    with _MAKING:
        return _TURNS.setdefault(model, _Turns())


def _who() -> Any:
    """The task of asyncio that runs, or else the thread."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no loop runs in this thread
        task = None
    return task or threading.current_thread()


def _take(turns: _Turns) -> None:
    """Wait for the turn.

    Raises:
        UserError: another task of this thread has it, which would have to go on before this one can.
    """
    ident = threading.get_ident()
    turns.waiting.add(ident)
    try:
        turns.lock.acquire()
    finally:
        turns.waiting.discard(ident)
    if turns.owner is not None:
        turns.lock.release()
        raise UserError(
            "Another task of this thread is within `using`, `rows` or `disabled` of the same model and has not come to "
            "its end, so this one cannot switch adapters. Do not await within these blocks, or guard them by one "
            "asyncio.Lock."
        )


@contextmanager
def _for_others(model: nn.Module, me: Any) -> Iterator[None]:
    """Within the block calls of the model, and of models within it, from other threads are refused."""
    number = next(_NUMBERS)
    inner = {module for module in model.modules() if hasattr(type(module), "get_input_embeddings")}
    _OPEN[number] = me
    hooks = [each.register_forward_pre_hook(partial(_refuse_others, number), prepend=True) for each in {model, *inner}]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        del _OPEN[number]


def _refuse_others(number: int, module: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    owner = _OPEN.get(number)
    if owner is not None and owner is not _who():
        raise UserError(
            f"This {type(module).__name__} was called by {_named(_who())} while {_named(owner)} switches its adapters, "
            f"or computes with other ones, so that the result would be wrong. {_ADVICE}"
        )


def _refuse_other_choice(model: nn.Module, inputs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    turns, me = _TURNS.get(model), _who()  # none: the model is a copy
    chosen = None if turns is None or turns.owner is me else turns.chosen.get(me)
    if chosen is not None and chosen != _in_use(model):
        raise UserError(
            f"The adapters of this {type(model).__name__} were chosen by {_named(me)}, and another thread has switched "
            f"them since, so that the result would not be the one that was asked for. {_ADVICE}"
        )


def _refuse_half_done(model: nn.Module, turns: _Turns) -> None:
    """See that no other thread is in the middle of a computation; one that begins now is refused by its hook."""
    apart = (threading.get_ident(), *turns.waiting)
    others = {thread.ident: thread.name for thread in threading.enumerate()
              if thread.ident not in apart and not thread.name.startswith(_OURS)}  # fmt: skip
    modules = set(model.modules()) if others else set()
    for ident, module in _computing(others):
        if seen_through(module) in modules:
            raise UserError(
                f"The thread {others[ident]!r} computes with this {type(model).__name__} right now, and would get a "
                f"wrong result if adapters were switched meanwhile. {_ADVICE}"
            )


def _computing(threads: Collection[int | None]) -> list[tuple[int, nn.Module]]:
    """The modules with which each of these threads computes at this moment.

    Garbage is collected later: it may let the thread run on while Python makes an object of one of its frames, and
    versions before 3.12.2 crash then.
    """
    found, collects = [], gc.isenabled()
    gc.disable()
    try:
        for ident, frame in sys._current_frames().items() if threads else ():
            at: FrameType | None = frame if ident in threads else None
            while at is not None:
                if at.f_code.co_name in _CALLS and isinstance(module := at.f_locals.get("self"), nn.Module):
                    found.append((ident, module))
                at = at.f_back
    finally:
        if collects:
            gc.enable()
    return found


def _in_use(model: nn.Module) -> Choice:
    return tuple((each.name, each.order) for each in model.__dict__.get(ADAPTERS, ()) if each.enabled)


def _named(who: Any) -> str:
    return f"the thread {who.name!r}" if isinstance(who, threading.Thread) else f"the task {who.get_name()!r}"
