"""One batch for several adapters: each row is computed with its own, and equals what it would be alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.delta import AdaptedForward, Base
from peftlight.errors import UserError, listed
from peftlight.linear import is_linear
from peftlight.row_order import RowOrder
from peftlight.strategy import Adapter

_APART = (nn.Embedding, nn.LayerNorm)
"""Modules beside linear layers that compute each row apart from the others."""

Call = Callable[..., Any]


@contextmanager
def by_rows(
    adapters: Mapping[str, Adapter], names: Sequence[str | None], all_off: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """Within the block, row i of a batch is computed with `adapters[names[i]]`, with None by the bare base.

    At each adapted module the rows are parted by adapter, computed, and put together again in their order. Works for
    adapters that act on linear layers and embeddings (LoRA and its family, IA³) and for what they train in place, a
    head for example; without gradients.

    Args:
        adapters: by name; all of one model.
        names: one for each row; where `generate` repeats rows (beams), each repetition goes with its row.
        all_off: switches all adapters of the model off within its block.

    Raises:
        UserError: an adapter does not act on each row apart. Within the block: the batch has another number of rows,
            or the model does not keep them in the first dimension.
    """
    for adapter in adapters.values():
        _check(adapter)
    if not adapters:
        with all_off(), torch.no_grad():
            yield
        return
    order = RowOrder(next(iter(adapters.values())).model, len(names))
    with all_off(), torch.no_grad(), order.watched():
        sites: dict[nn.Module, _Parted] = {}
        for name, adapter in adapters.items():
            for module, call in _calls(adapter):
                sites.setdefault(module, _Parted(module, names, order)).calls[name] = call
        before = {module: module.__dict__.get("forward") for module in sites}
        try:
            for module, parted in sites.items():
                module.forward = parted
            yield
        finally:
            for module, forward in before.items():
                _put_back(module, forward)


@dataclass
class _Parted:
    """The forward of a module whose rows belong to several adapters."""

    module: nn.Module
    names: Sequence[str | None]
    order: RowOrder
    calls: dict[str, Call] = field(default_factory=dict)
    """The forward of each adapter that changes this module; the others' rows are computed by the module's own."""

    def __post_init__(self) -> None:
        self.own = _own_forward(self.module)

    def __call__(self, x: Tensor) -> Tensor:
        repeated = self.order.repeats(self.module, x)
        if self.order.tried:
            own: Tensor = self.own(x)
            return own
        y: Tensor | None = None
        for name in dict.fromkeys(name if name in self.calls else None for name in self.names):
            mine = [(each if each in self.calls else None) == name for each in self.names]
            rows = torch.tensor(mine, device=x.device).repeat_interleave(repeated)
            part = self.own(x[rows]) if name is None else self.calls[name](x[rows])
            y = part.new_empty(len(x), *part.shape[1:]) if y is None else y
            if part.shape[1:] != y.shape[1:]:
                raise UserError(
                    f"The adapters of this batch give outputs of other widths, {part.shape[-1]} and {y.shape[-1]}: "
                    "their heads have other numbers of classes. Put rows of one width in a batch."
                )
            y[rows] = part
        assert y is not None
        return y


def _check(adapter: Adapter) -> None:
    modules = [adapter.model.get_submodule(site) for site in adapter.sites] + list(_values(adapter))
    odd = {module for module in modules if not (is_linear(module) or isinstance(module, _APART))}
    if odd or adapter.merged:
        others = [name for name, module in adapter.model.named_modules() if module in odd]
        why = "it is merged" if adapter.merged else f"it changes {listed(others, 3)}"
        raise UserError(
            f"The adapter {adapter.name!r} ({type(adapter.strategy).__name__}) cannot serve single rows of a batch: "
            f"{why}. Adapters on linear layers can, such as LoRA and IA3; others need a batch of their own."
        )


def _calls(adapter: Adapter) -> Iterator[tuple[nn.Module, Call]]:
    """The modules that the adapter changes, and their forward with it alone."""
    sites = {adapter.model.get_submodule(site): delta for site, delta in adapter.sites.items()}
    values = _values(adapter)
    for module in dict.fromkeys([*sites, *values]):
        call: Call = _own_forward(module)
        if module in sites:
            call = partial(sites[module], Base(module, call, True))
        if module in values:
            call = partial(_with_values, module, values[module], call)
        yield module, call


def _values(adapter: Adapter) -> dict[nn.Module, dict[str, Tensor]]:
    """What the adapter trains in place, by every module that holds it: a tied tensor has several."""
    tensors = adapter.model.state_dict(keep_vars=True)
    own = {id(tensors[name]): value for name, value in adapter.state().items() if name in adapter.originals}
    found: dict[nn.Module, dict[str, Tensor]] = {}
    for module in adapter.model.modules():
        for leaf, tensor in (*module.named_parameters("", False, False), *module.named_buffers("", False, False)):
            if id(tensor) in own:
                found.setdefault(module, {})[leaf] = own[id(tensor)]
    return found


def _with_values(module: nn.Module, values: Mapping[str, Tensor], call: Call, x: Tensor) -> Tensor:
    tensors = {leaf: getattr(module, leaf) for leaf in values}
    held = {leaf: tensor.data for leaf, tensor in tensors.items()}
    try:
        for leaf, value in values.items():
            tensors[leaf].data = value
        y: Tensor = call(x)
        return y
    finally:
        for leaf, value in held.items():
            tensors[leaf].data = value


def _own_forward(module: nn.Module) -> Call:
    adapted = module.__dict__.get("forward")
    return adapted.own if isinstance(adapted, AdaptedForward) else module.forward


def _put_back(module: nn.Module, forward: Call | None) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.forward = forward
