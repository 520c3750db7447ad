"""Whether what is written is the fold and the fold is the adapter, whatever the number format rounds away.

Scores cannot tell: in bfloat16 rounding may move them more than a small adapter does. So each step is held to its own
precision: a module with its folded weight computes what it does with its delta; what is to be written is that weight,
rounded; and what is loaded again is, bit for bit, what was to be written.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.delta import remove
from peftlight.errors import UserError, listed
from peftlight.interop.contents import Tensors
from peftlight.linear import is_conv1d, write_weight
from peftlight.strategy import Adapter

LIMIT = 1e-5
"""How far a module's outputs may be from those with the delta, as a share of their norm: the fold is in float32.

Right folds of the recipes in the tests, on six tiny models, reached 3e-7.
"""
_REFUSED = "The merged model is not written: it does not compute what base and adapter do."
Calls = Mapping[str, tuple[tuple[Any, ...], dict[str, Any]]]


class NotTheSame(UserError):
    """What was to be written does not compute what base and adapter do."""


@contextmanager
def noted_calls(adapter: Adapter) -> Iterator[Calls]:
    """Within the block the first inputs of each adapted module are noted, by its name."""
    noted: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    handles = [
        adapter.model.get_submodule(site).register_forward_pre_hook(partial(_note, noted, site), with_kwargs=True)
        for site in adapter.sites
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_folding(adapter: Adapter, state: Tensors, calls: Calls) -> float | None:
    """See that the weights in `state` are the adapter's, folded and rounded.

    Args:
        adapter: on its model, in use.
        state: what is to be written, by its name in the bare model.
        calls: inputs of the adapted modules; one that has none, since no probe reached it, is judged by its weight.

    Returns:
        ‖y' - y‖ / ‖y‖ of the module where it is largest; y are the outputs with the delta, y' with the folded weight,
        both computed in float64. None where nothing was called.

    Raises:
        NotTheSame: a fold computes something else, or something else is to be written.
    """
    gaps = []
    for site in adapter.sites:
        weight, bias = adapter.folded(site)
        module = adapter.model.get_submodule(site)
        if site in calls:
            gaps.append(_gap(module, adapter.name, (weight, bias), calls[site]))
            if not gaps[-1] <= LIMIT:
                raise _differs(site, f"its outputs are off by {gaps[-1]:.2e} of their norm (allowed: {LIMIT:g})")
        for leaf, exact in (("weight", weight.T if is_conv1d(module) else weight), ("bias", bias)):
            if exact is not None and not _is_rounded(state[f"{site}.{leaf}".lstrip(".")], exact):
                raise _differs(site, f"what was to be written is not its folded {leaf}, rounded")
    return max(gaps, default=None)


def digests(state: Mapping[str, Tensor]) -> dict[str, str]:
    """The sha256 of each tensor's bytes, by its name."""
    return {name: _digest(value) for name, value in state.items()}


def check_loaded(model: nn.Module, written: Mapping[str, str], dtype: torch.dtype) -> None:
    """See that a model holds the tensors with these digests, in this number format.

    Raises:
        NotTheSame: one of them differs.
    """
    held = model.state_dict()
    same = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in held.items()}
    if wrong := [name for name, digest in written.items() if name not in same or _digest(same[name]) != digest]:
        raise NotTheSame(
            f"{_REFUSED} Loaded again, {len(wrong)} of {len(written)} tensors are not what was written: "
            f"{listed(wrong, 4)}."
        )


def _note(noted: dict[str, Any], site: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    if site not in noted:
        noted[site] = tuple(map(_kept, args)), {name: _kept(value) for name, value in kwargs.items()}


def _kept(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to("cpu", torch.float64 if value.is_floating_point() else value.dtype, copy=True)


def _gap(module: nn.Module, name: str, folded: tuple[Tensor, Tensor | None], call: Any) -> float:
    args, kwargs = call
    twin = copy.deepcopy(module).to("cpu").double().eval()
    expected = twin(*args, **kwargs)
    remove(twin, name)
    write_weight(twin, folded[0])
    if folded[1] is not None:
        twin.get_parameter("bias").copy_(folded[1])
    given = twin(*args, **kwargs)
    return float((given - expected).norm() / expected.norm().clamp(min=torch.finfo(torch.float32).tiny))


def _is_rounded(stored: Tensor, exact: Tensor) -> bool:
    """Whether each number is as near as its format allows; twice that, for the fold is computed anew here."""
    format_ = torch.finfo(stored.dtype)
    return bool(((stored.to(exact) - exact).abs() <= format_.eps * exact.abs() + format_.smallest_normal).all())


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _differs(site: str, how: str) -> NotTheSame:
    return NotTheSame(f"{_REFUSED} At {site or 'the model'} {how}.")
