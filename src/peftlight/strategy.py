"""What a strategy is, and what it leaves on a model: an adapter."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD, Delta, install, remove, unchanged_on_error
from peftlight.errors import UserError, listed
from peftlight.targets import matching


class PEFTStrategy:
    """A recipe for parameter-efficient fine-tuning.

    A subclass is a dataclass whose fields are its hyperparameters. Every hook has a default that does nothing, so a
    strategy states only what it changes; most override `deltas` alone.
    """

    restorable: bool = True
    """Whether the base's values are kept while they are trained in place, so that `Adapter.remove` restores them."""

    def deltas(self, model: nn.Module) -> Iterable[tuple[str, Delta]]:
        """Pairs (module name, delta) to install. The base is frozen when this is called."""
        return ()

    def train(self, model: nn.Module) -> Iterable[str]:
        """Names of the base's modules (whole) and parameters that are trained in place; "" is the whole model."""
        return ()

    def penalty(self, adapter: "Adapter") -> Tensor | None:
        """A scalar added to the task loss, or None. Its gradient is taken once for each optimizer step."""
        return None

    def after_step(self, adapter: "Adapter", step: int, last_step: int) -> None:
        """Called after optimizer step number `step` (1 to `last_step`), while the gradients are still there."""


@dataclass(eq=False)
class Adapter:
    """What one strategy added to one model under one name."""

    name: str
    model: nn.Module
    strategy: PEFTStrategy
    sites: dict[str, Delta] = field(default_factory=dict)
    """The deltas by the name of the module they sit on."""
    trained: list[str] = field(default_factory=list)
    """Names of the base's modules and parameters trained in place."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """The values that `trained` had before, where the strategy is restorable."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that this adapter trains, by its name in the model."""
        owned = self._own_names()
        return {name: p for name, p in self.model.named_parameters() if name in owned}

    def state(self) -> dict[str, Tensor]:
        """Everything that must be saved, detached: the parameters, and the buffers of what is trained whole."""
        owned = self._own_names()
        return {name: value.detach() for name, value in self.model.state_dict().items() if name in owned}

    def load_state(self, state: Mapping[str, Tensor], origin: str = "the state") -> None:
        """Copy `state` into the model.

        Raises:
            UserError: a key is missing, unexpected or of another shape; nothing has been copied then.
        """
        own = self.state()
        wrong = [f"{key} has shape {tuple(state[key].shape)} in {origin}, {tuple(own[key].shape)} in the model"
                 for key in own.keys() & state.keys() if own[key].shape != state[key].shape]  # fmt: skip
        for kind, keys in (("missing from", own.keys() - state.keys()), ("not part of the model but in",
                           state.keys() - own.keys())):  # fmt: skip
            if keys:
                wrong.append(f"{kind} {origin}: {listed(sorted(keys))}")
        if wrong:
            raise UserError(f"The adapter {self.name!r} cannot be loaded from {origin}:\n  " + "\n  ".join(wrong))
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes as it did before `attach`."""
        if not self.strategy.restorable:
            raise UserError(f"{type(self.strategy).__name__} trains the base itself, which is not kept beside it.")
        kept, flags = self._values_of_originals(), [(delta, delta.enabled) for delta in self.sites.values()]
        self._put(self.originals)
        for delta, _ in flags:
            delta.enabled = False
        try:
            yield
        finally:
            self._put(kept)
            for delta, enabled in flags:
                delta.enabled = enabled

    def remove(self) -> None:
        """Take the adapter off the model and restore the base's own values bit for bit."""
        with self.disabled():
            originals = self._values_of_originals()
        for site in self.sites:
            remove(self.model.get_submodule(site), self.name)
        self.sites = {}
        self._put(originals)
        for parameter in self.parameters().values():
            parameter.requires_grad_(False)
        self.trained, self.originals = [], {}

    def _values_of_originals(self) -> dict[str, Tensor]:
        own = self._tensors()
        return {name: own[name].detach().clone() for name in self.originals}

    def _own_names(self) -> set[str]:
        """The names of what belongs to this adapter; of a tied parameter's names, the first."""
        owned = _owned(self.model, self.sites, self.trained, self.name)
        tensors = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        first: dict[int, str] = {}
        for name, tensor in tensors:
            first.setdefault(id(tensor), name)
        return {first[id(tensor)] for name, tensor in tensors if name in owned}

    def _put(self, values: Mapping[str, Tensor]) -> None:
        own = self._tensors()
        with torch.no_grad():
            for name, value in values.items():
                tensor = own[name]
                if tensor.dtype != value.dtype:  # what is trained may have been put into float32 since
                    tensor.data = tensor.data.to(value.dtype)
                tensor.copy_(value)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}


def attach(
    model: nn.Module, strategy: PEFTStrategy, name: str = "default", *, modules_to_train: Collection[str] = ()
) -> Adapter:
    """Freeze `model`, put `strategy` on it, and return the adapter.

    Args:
        model: any module; it is changed in place, and its own parameters keep their names.
        strategy: the recipe.
        name: the adapter's name, part of its parameters' names (`q_proj.deltas.<name>.A`).
        modules_to_train: modules of the base that are trained whole beside the strategy, a new head for example.

    Raises:
        UserError: a name matches nothing, or nothing would be trained.
    """
    if not name or "." in name:
        raise UserError(f"An adapter's name is not empty and has no dot; got {name!r}.")
    with unchanged_on_error(model):
        model.requires_grad_(False)
        heads = matching(model, list(modules_to_train))
        adapter = Adapter(name, model, strategy, trained=list(dict.fromkeys([*heads, *strategy.train(model)])))
        _train_in_place(adapter)
        for site, delta in list(strategy.deltas(model)):
            module = model.get_submodule(site)
            install(module, name, _placed(delta, module))
            adapter.sites[site] = delta
        if not adapter.parameters():
            raise UserError(f"{type(strategy).__name__} would train nothing on this {type(model).__name__}.")
    return adapter


def _train_in_place(adapter: Adapter) -> None:
    if adapter.strategy.restorable:
        adapter.originals = {name: value.clone() for name, value in adapter.state().items()}
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(True)


def _placed(delta: Delta, module: nn.Module) -> Delta:
    """The delta in its module's mode and on its device; in float32, or in float64 where the base is."""
    delta.train(module.training)
    beside = next((p for p in module.parameters() if p.is_floating_point()), None)
    if beside is None:
        return delta
    return delta.to(beside.device, torch.float64 if beside.dtype == torch.float64 else torch.float32)


def _owned(model: nn.Module, sites: Iterable[str], trained: Iterable[str], name: str) -> set[str]:
    """Names in the model's state dict that belong to an adapter of that name."""
    whole = tuple(f"{module}." for module in trained if module)
    exact = set(trained)
    prefixes = tuple(f"{site}.{CHILD}.{name}.".lstrip(".") for site in sites) + whole
    every = "" in exact
    return {key for key in model.state_dict() if every or key in exact or key.startswith(prefixes)}
