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
        names: one for each row; where the model repeats rows (beams), each repetition goes with its row.
        all_off: switches all adapters of the model off within its block.

    Raises:
        UserError: an adapter does not act on each row apart.
    """
    for adapter in adapters.values():
        _check(adapter)
    sites: dict[nn.Module, _Parted] = {}
    for name, adapter in adapters.items():
        for module, call in _calls(adapter):
            sites.setdefault(module, _Parted(module, names)).calls[name] = call
    with all_off(), torch.no_grad():
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
    calls: dict[str, Call] = field(default_factory=dict)
    """The forward of each adapter that changes this module; the others' rows are computed by the module's own."""

    def __post_init__(self) -> None:
        self.own = _own_forward(self.module)

    def __call__(self, x: Tensor) -> Tensor:
        repeated, rest = divmod(len(x), len(self.names))
        if rest:
            raise UserError(
                f"The batch was said to have {len(self.names)} rows, but a {type(self.module).__name__} in it got "
                f"{len(x)}, which is no multiple: give one adapter name for each row."
            )
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
    modules = {site: adapter.model.get_submodule(site) for site in adapter.sites}
    modules |= {name.rpartition(".")[0]: adapter.model.get_submodule(name.rpartition(".")[0])
                for name in adapter.originals}  # fmt: skip
    others = [name for name, module in modules.items() if not (is_linear(module) or isinstance(module, _APART))]
    if others or adapter.merged:
        why = "it is merged" if adapter.merged else f"it changes {listed(others, 3)}"
        raise UserError(
            f"The adapter {adapter.name!r} ({type(adapter.strategy).__name__}) cannot serve single rows of a batch: "
            f"{why}. Adapters on linear layers can, such as LoRA and IA3; others need a batch of their own."
        )


def _calls(adapter: Adapter) -> Iterator[tuple[nn.Module, Call]]:
    """The modules that the adapter changes, and their forward with it alone."""
    own = {name: value for name, value in adapter.state().items() if name in adapter.originals}
    sites = {adapter.model.get_submodule(site): delta for site, delta in adapter.sites.items()}
    values: dict[nn.Module, dict[str, Tensor]] = {}
    for name, value in own.items():
        path, _, leaf = name.rpartition(".")
        values.setdefault(adapter.model.get_submodule(path), {})[leaf] = value
    for module in dict.fromkeys([*sites, *values]):
        call: Call = _own_forward(module)
        if module in sites:
            call = partial(sites[module], Base(module, call, True))
        if module in values:
            call = partial(_with_values, module, values[module], call)
        yield module, call


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
