"""What a strategy is, and what it leaves on a model: an adapter."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from peftlight.checked_hooks import deltas_of, trained_by
from peftlight.class_paths import is_ours
from peftlight.delta import (
    ADAPTERS,
    CHILD,
    Delta,
    beneath,
    finishes_another,
    install,
    remove,
    set_adapters,
    unchanged_on_error,
)
from peftlight.errors import UserError, listed
from peftlight.fold_check import check_fold, is_of_user
from peftlight.head_size import classes_said, tell_sizes
from peftlight.linear import is_quantized, weight_of, write_weight
from peftlight.paths import first_names
from peftlight.shards import gathered, sharded_like
from peftlight.targets import matching
from peftlight.turns import turn
from peftlight.wrappers import plain_model, refuse_inner_wrappers

_SHOWN = 3

P = ParamSpec("P")
T = TypeVar("T")
Method = Callable[Concatenate["Adapter", P], T]


def _alone(*, chooses: bool = False) -> Callable[[Method[P, T]], Method[P, T]]:
    """The method runs while no other thread computes with the model; `chooses` is that of `turn`."""

    def wrap(method: Method[P, T]) -> Method[P, T]:
        @wraps(method)
        def alone(adapter: "Adapter", *args: P.args, **kwargs: P.kwargs) -> T:
            with turn(adapter.model, chooses=chooses, short=True):
                return method(adapter, *args, **kwargs)

        return alone

    return wrap


@dataclass(frozen=True)
class Material:
    """What a strategy may look at before a training begins."""

    batches: Callable[[], Iterable[Mapping[str, Tensor]]]
    """Gives the model's inputs, batch after batch of training rows, anew at each call."""
    token_ids: Callable[[str], list[int]]
    """Gives the tokens of a text, without special ones."""


class PEFTStrategy:
    """A recipe for parameter-efficient fine-tuning.

    A subclass is a dataclass whose fields are its hyperparameters. Every hook has a default that does nothing, so a
    strategy states only what it changes; most override `deltas` alone.
    """

    restorable: bool = True
    """Whether the base's values are kept while they are trained in place, so that `Adapter.remove` restores them."""
    starts_unchanged: bool = True
    """Whether the model computes the same right after `attach` as before."""

    def uses(self, hook: str) -> bool:
        """Whether the hook of that name does anything."""
        return getattr(type(self), hook) is not getattr(PEFTStrategy, hook)

    def deltas(self, model: nn.Module) -> Iterable[tuple[str, Delta]]:
        """Pairs (module name, delta) to install, one for each module. The base is frozen when this is called."""
        return ()

    def train(self, model: nn.Module) -> Iterable[str]:
        """Names of the base's modules (whole) and parameters that are trained in place; "" is the whole model."""
        return ()

    def parts(self, adapter: "Adapter") -> Sequence["Adapter"]:
        """Views of the adapters that this one is made of, where a strategy combines others."""
        return ()

    def prepare(self, adapter: "Adapter", material: Material) -> None:
        """Called once before a training that starts anew, to initialise from data; not when one is resumed."""

    def learning_rates(self, adapter: "Adapter") -> Mapping[str, float]:
        """Factors on the optimizer's learning rate by the parameter's name in the model; the others have 1."""
        return {}

    def penalty(self, adapter: "Adapter") -> Tensor | None:
        """A scalar added to the task loss, or None. Its gradient is taken once for each optimizer step."""
        return None

    def check_steps(self, last_step: int) -> None:
        """Called before the first step of a training of `last_step` optimizer steps.

        Raises:
            UserError: what the strategy plans does not fit into them.
        """

    def after_step(self, adapter: "Adapter", step: int, last_step: int) -> None:
        """Called after optimizer step number `step` (1 to `last_step`), while the gradients are still there.

        With 16-mixed, the gradients of some steps are not finite, and those have moved nothing.
        """

    def unmet(self, adapter: "Adapter", step: int, last_step: int) -> str | None:
        """What of its plan is left undone by a training that ends after `step` of `last_step` steps; it is said."""
        return None

    def figures(self, adapter: "Adapter") -> Mapping[str, float]:
        """Numbers to log after an optimizer step, by name; ranks, for example."""
        return {}

    def finished(self, adapter: "Adapter") -> "PEFTStrategy":
        """The recipe of what is saved, if that is simpler than what was trained; see `Delta.finished`."""
        return self


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
    heads: list[str] = field(default_factory=list)
    """Those of `trained` that are trained beside the strategy, whatever it is: a new head, for example."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """The values that `trained` had before, where they are kept: the base's, or those of an adapter attached earlier.

    These and the three below lie outside the model: they follow it to its device, but not when it is cast to another
    precision, for they are what restores the base bit for bit. Cast a model before there are adapters on it.
    """
    cast: dict[str, Tensor] = field(default_factory=dict)
    """The frozen vectors that `train_in_float32` has put into float32, as they were before."""
    merged: dict[str, Tensor] = field(default_factory=dict)
    """The values, before `merge`, of what it wrote."""
    enabled: bool = True
    """Whether the model computes with it; see `enable` and `disable`."""
    aside: dict[str, Tensor] = field(default_factory=dict)
    """While it is off: the values that it gives to the base's own tensors."""
    labels: dict[str, Any] = field(default_factory=dict)
    """Where it has a head of its own size: what the config says of the classes without it; while it is off, with it."""
    order: int = 0
    """Its place among the adapters of the model, which lie upon each other in the order of attaching."""

    @property
    def parts(self) -> list["Adapter"]:
        """Views of all that it combines, however deep; of a single strategy itself."""
        parts = self.strategy.parts(self)
        return [one for part in parts for one in part.parts] if parts else [self]

    def parameters(self) -> dict[str, nn.Parameter]:
        """All that this adapter trains, by its name in the model."""
        owned = self._own_names()
        return {name: p for name, p in self.model.named_parameters() if name in owned}

    def state(self) -> dict[str, Tensor]:
        """All that must be kept, detached: parameters and buffers by their names in the model, shared ones once.

        Of what is sharded over processes it is the part here, except within `whole`.
        """
        self._follow()
        base, first = self.model.state_dict(keep_vars=True), first_names(self.model)
        owned = _owned(base, [], self.trained, self.name)
        kept = {name: value for name, value in base.items() if name in owned}
        kept = {first[id(value)]: value for value in kept.values()}
        seen = set()
        for site, delta in self.sites.items():
            for key, value in delta.state_dict(keep_vars=True).items():
                if id(value) not in seen:
                    kept[self._prefix(site) + key] = value
                seen.add(id(value))
        own = {**self._covered(kept), **self.aside, **self.merged}
        return {name: own.get(name, value).detach() for name, value in kept.items()}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within the block, what is sharded over processes is whole in each of them; all have to enter it.

        Only then can the adapter be read, finished and saved as in a single process; the model cannot compute.
        """
        with gathered(self.model, self.parameters().values()):
            yield

    @_alone()
    def load_state(self, state: Mapping[str, Tensor], origin: str = "the state") -> None:
        """Copy `state` into the model.

        Raises:
            UserError: a key is missing, unexpected or of another shape; nothing has been copied then.
        """
        if self.merged:
            raise UserError(f"The adapter {self.name!r} is merged; unmerge it before loading into it.")
        for site, delta in self.sites.items():
            prefix = self._prefix(site)
            delta.take_shapes({key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})
        own = self.state()
        shapes = [f"{key} has shape {tuple(state[key].shape)} in {origin}, {tuple(own[key].shape)} in the model"
                  for key in sorted(own.keys() & state.keys()) if own[key].shape != state[key].shape]  # fmt: skip
        wrong = [*shapes[:_SHOWN], *([f"and {len(shapes) - _SHOWN} more"] if len(shapes) > _SHOWN else [])]
        for kind, keys in (("missing from", own.keys() - state.keys()), ("not part of the model but in",
                           state.keys() - own.keys())):  # fmt: skip
            if keys:
                wrong.append(f"{kind} {origin}: {listed(sorted(keys))}")
        if wrong:
            raise UserError(f"The adapter {self.name!r} cannot be loaded from {origin}:\n  " + "\n  ".join(wrong))
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(sharded_like(state[key], value))

    def train_also(self, names: Collection[str]) -> None:
        """Train these parameters of the base in place from now on, beside what is trained already; in float32.

        A module without deltas is owned whole where all its parameters are among them.
        """
        owners = {name.rpartition(".")[0]: self.model.get_submodule(name.rpartition(".")[0]) for name in names}
        whole = {path for path, module in owners.items()
                 if path and not any(True for _ in module.children())
                 and all(f"{path}.{leaf}" in names for leaf, _ in module.named_parameters(recurse=False))}  # fmt: skip
        before = self.state()
        self.trained += [*sorted(whole), *(name for name in names if name.rpartition(".")[0] not in whole)]
        if self.strategy.restorable or self.originals:
            self.originals |= {name: value.clone() for name, value in self.state().items() if name not in before}
        for name in names:
            self.model.get_parameter(name).requires_grad_(True)
        self.train_in_float32()

    def train_in_float32(self) -> None:
        """Put what trains into float32 on a base in half precision, together with the vectors beside it.

        A normalisation takes weight, bias and running statistics in one precision only.
        """
        own, first = self.parameters(), first_names(self.model)
        for name, parameter in own.items():
            module = self.model.get_submodule(name.rpartition(".")[0])
            beside: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for each in [parameter, *(other for other in beside if other.dim() == parameter.dim() == 1)]:
                if each.dtype in (torch.bfloat16, torch.float16):
                    if first[id(each)] not in {**own, **self.originals}:
                        self.cast[first[id(each)]] = each.data
                    each.data = each.data.float()

    def finished(self) -> "Adapter":
        """This adapter as it is saved, without what only training needed; a view that leaves the model as it is."""
        strategy = self.strategy.finished(self)
        done = replace(self, strategy=strategy, sites={site: delta.finished() for site, delta in self.sites.items()})
        return self if _is_another(self, done) else done

    @_alone()
    def merge(self) -> None:
        """Fold the deltas into the weights of their modules, so that they cost nothing; `unmerge` takes it back.

        Raises:
            UserError: a delta cannot be folded or folds wrongly, its weight is shared with another module, it lies
                above the delta of another adapter, or another one has written the same tensors; nothing has been
                merged then.
        """
        if self.merged:
            raise UserError(f"The adapter {self.name!r} is merged already.")
        if not self.enabled:
            raise UserError(f"The adapter {self.name!r} is switched off; enable it before merging it.")
        for site, delta in self.sites.items():
            self._check_unshared(site)
            if is_of_user(delta):
                module = self.model.get_submodule(site)
                check_fold(delta, module, weight_of(module), getattr(module, "bias", None))
        values: dict[str, tuple[nn.Module, Tensor]] = {}
        for site in self.sites:
            module, (weight, bias) = self.model.get_submodule(site), self.folded(site)
            values[f"{site}.weight".lstrip(".")] = module, weight
            if bias is not None and not torch.equal(bias, module.get_parameter("bias").to(bias.dtype)):
                values[f"{site}.bias".lstrip(".")] = module, bias
        self._check_alone(values)
        self.merged = {name: self._tensor(name).detach().clone() for name in values}
        for name, (module, value) in values.items():
            if name.endswith("weight"):
                write_weight(module, value)
            else:
                module.get_parameter("bias").data.copy_(value)
        for delta in self.sites.values():
            delta.enabled = False

    def _check_alone(self, names: Iterable[str]) -> None:
        """A weight with a delta in it is not one that another adapter may train, or write once more."""
        for other in adapters_on(self.model):
            shared = [name for name in names if other is not self and (name in other.merged or name in other.originals)]
            if shared:
                how = "merged into" if shared[0] in other.merged else "trained with"
                raise UserError(
                    f"The adapter {self.name!r} cannot be merged: {other.name!r} is {how} {listed(shared, 3)} too. "
                    f"{'Unmerge' if shared[0] in other.merged else 'Remove'} that one first."
                )

    @_alone()
    def unmerge(self) -> None:
        """Restore the weights that `merge` wrote bit for bit, and compute through the deltas again."""
        if self.enabled:
            self._put(self.merged)
        else:
            self.aside = {name: self.merged.get(name, value) for name, value in self.aside.items()
                          if name in self.originals or name not in self.merged}  # fmt: skip
        self.merged = {}
        for delta in self.sites.values():
            delta.enabled = self.enabled

    def folded(self, site: str) -> tuple[Tensor, Tensor | None]:
        """The weight, laid out as by `weight_of`, and the bias with which the bare module computes the same.

        They are at least in float32; the model is left as it is, and other modules may share the weight.

        Raises:
            UserError: no weight does that, or it lies above the delta of another adapter.
        """
        module, where = self.model.get_submodule(site), self._where(site)
        if below := beneath(module, self.name):
            raise UserError(f"{where}{listed(below)} lies beneath it; merge that one first.")
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            raise UserError(f"{where}this {type(module).__name__} has no weight to fold into.")
        bias = module.get_parameter("bias").detach() if getattr(module, "bias", None) is not None else None
        try:
            weight = weight_of(module)
            dtype = torch.promote_types(weight.dtype, torch.float32)
            with torch.no_grad():
                return self.sites[site].fold(weight.to(dtype), None if bias is None else bias.to(dtype))
        except UserError as error:
            raise UserError(f"{where}{error}") from None

    def _check_unshared(self, site: str) -> None:
        weight = getattr(self.model.get_submodule(site), "weight", None)
        names = [name for name, p in self.model.named_parameters(remove_duplicate=False) if p is weight]
        if len(names) > 1:
            raise UserError(f"{self._where(site)}its weight is shared by {listed(names)}, which would change too.")

    def _where(self, site: str) -> str:
        return f"The adapter {self.name!r} cannot be merged at {site!r}: "

    @_alone(chooses=True)
    def disable(self) -> None:
        """Switch the adapter off: the model computes as it did before `attach`. Nothing is copied.

        Raises:
            UserError: it trains the base itself, which is not kept beside it.
        """
        if not (self.strategy.restorable or self.originals):
            raise UserError(f"{type(self.strategy).__name__} trains the base itself, which is not kept beside it.")
        if self.enabled:
            self.aside = self._exchange(self.beneath)
            self._switch(False)

    @_alone(chooses=True)
    def enable(self) -> None:
        """Switch the adapter on again, in the place that it has by the order of attaching.

        Where several adapters that are on train the same tensor of the base, the model computes with the value of the
        one that was attached last.

        Raises:
            UserError: another adapter that is on trains what this one is merged into, or the other way round.
        """
        if not self.enabled:
            self._refuse_merged_and_trained()
            held = self._exchange(self.aside)  # not what was there at `disable`: another adapter may have written there
            self.originals = {name: held[name] for name in self.originals}
            self.cast = {name: held[name] for name in self.cast}
            # What is trained in place had its trained value before the merge, which is not the base's.
            self.merged = {
                name: before if name in self.originals else held[name] for name, before in self.merged.items()
            }
            self.aside = {}
            self._switch(True)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model computes as it did before `attach`.

        Raises:
            UserError: another thread computes with the model; it can call the model within the block as little.
        """
        with turn(self.model):
            was = self.enabled
            self.disable()
            try:
                yield
            finally:
                if was:
                    self.enable()

    @_alone()
    def remove(self) -> None:
        """Take the adapter off the model, which is then as if it had never been there, bit for bit.

        Several adapters may be taken off in any order; what another one that is on trains stays as that one has it.

        Raises:
            UserError: it trains the base itself, which is not kept beside it.
        """
        parameters = self.parameters()
        self.disable()
        for site in self.sites:
            remove(self.model.get_submodule(site), self.name)
        set_adapters(self.model, [other for other in adapters_on(self.model) if other is not self])
        still = {name for other in adapters_on(self.model) if other.enabled for name in other.parameters()}
        for name in parameters.keys() - still:
            parameters[name].requires_grad_(False)
        self.sites, self.trained = {}, []
        self.originals, self.cast, self.merged, self.aside = {}, {}, {}, {}

    def _switch(self, on: bool) -> None:
        self.enabled = on
        for delta in self.sites.values():
            delta.enabled = on and not self.merged

    @property
    def beneath(self) -> dict[str, Tensor]:
        """Of all that it changes in the base's own tensors: what they hold while it is off, as known while it is on."""
        return {**self.merged, **self.cast, **self.originals}

    def _exchange(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let the tensors of these names hold `values`; returns what they held.

        Where an adapter that was attached later and is on has the tensor, its own value stays in the model, and
        `values` become what lies beneath it.
        """
        held, uncovered, resized = {}, {}, None
        for name, value in values.items():
            tensor, above = self._tensor(name), self._above(name)
            if above is None:
                held[name] = uncovered[name] = tensor.data
                tensor.data = value.to(tensor.device)
            else:
                kept = above.originals if name in above.originals else above.cast
                held[name], kept[name] = kept[name], value
                resized = above if value.shape != held[name].shape else resized
        if resized is None:
            self.labels = tell_sizes(self.model, uncovered, self.labels)
        else:
            self.labels, resized.labels = resized.labels or classes_said(self.model), self.labels
        return held

    def _above(self, name: str) -> "Adapter | None":
        """The next adapter in the order of attaching that is on and keeps another value of this tensor."""
        later = (other for other in adapters_on(self.model) if other.order > self.order and other.enabled)
        return next((other for other in later if name in other.originals or name in other.cast), None)

    def _covered(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Its own values of those tensors that hold the value of an adapter attached later."""
        above = {name: self._above(name) for name in names} if self.enabled else {}
        return {name: other.beneath[name] for name, other in above.items() if other is not None}

    def _refuse_merged_and_trained(self) -> None:
        """See that no weight with a delta merged into it is trained by another adapter that is on.

        Raises:
            UserError: one is.
        """
        others = [other for other in adapters_on(self.model) if other.enabled and other is not self]
        for one, two in [(self, other) for other in others] + [(other, self) for other in others]:
            trained = (two.originals or two.parameters()) if one.merged else {}
            if shared := [name for name in one.merged if name in trained]:
                raise UserError(
                    f"The adapter {one.name!r} is merged into {listed(shared, 3)}, which {two.name!r} trains in place, "
                    f"so that only one of them can be on. Unmerge {one.name!r}, or disable one of them."
                )

    def _follow(self) -> None:
        """Bring what is kept beside the model to where its tensors are; nothing is copied on the same device."""
        for kept in (self.originals, self.cast, self.merged, self.aside):
            for name, value in kept.items():
                kept[name] = value.to(self._tensor(name).device)

    def site_of(self, name: str) -> str | None:
        """The module whose delta a parameter of that name in the model belongs to; None: it is the base's own."""
        path, mark, _ = f".{name}".rpartition(f".{CHILD}.{self.name}.")
        return path.lstrip(".") if mark else None

    def _prefix(self, site: str) -> str:
        """What the names of a site's tensors begin with in the model."""
        return _prefix(site, self.name)

    def _own_names(self) -> set[str]:
        """The names of what belongs to this adapter; of a tied parameter's names, the first."""
        names: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        names.update(self.model.named_buffers(remove_duplicate=False))
        first = first_names(self.model)
        return {first[id(names[name])] for name in _owned(names, self.sites, self.trained, self.name)}

    def _put(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                tensor = self._tensor(name)
                if tensor.dtype != value.dtype:  # what is trained may have been put into float32 since
                    tensor.data = tensor.data.to(value.dtype)
                tensor.copy_(value)

    def _tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self.model.get_submodule(path), leaf)
        return tensor


def _is_another(before: Adapter, after: Adapter) -> bool:
    """Whether a class of the user's changes what is computed, and has `finished` from one that does not."""
    if any(finishes_another(delta) for delta in before.sites.values()):
        return True
    kept = any(after.sites[site] is delta and not is_ours(type(delta)) for site, delta in before.sites.items())
    owner = next(kind for kind in type(before.strategy).__mro__ if "finished" in vars(kind))
    return kept and after.strategy is not before.strategy and (is_ours(owner) or is_ours(type(after.strategy)))


def adapters_on(model: nn.Module) -> list[Adapter]:
    """The adapters that are on the model, switched on or off; those attached first come first."""
    return list(model.__dict__.get(ADAPTERS, ()))


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """By name, the base's own values of what the adapters that are on have changed in place."""
    values: dict[str, Tensor] = {}
    for adapter in reversed(adapters_on(model)):
        values |= adapter.beneath if adapter.enabled else {}
    return values


def attach(
    model: nn.Module,
    strategy: PEFTStrategy,
    name: str = "default",
    *,
    modules_to_train: Collection[str] = (),
    keep_base: bool = False,
) -> Adapter:
    """Freeze `model`, put `strategy` on it, and return the adapter.

    Args:
        model: any module; it is changed in place, and its own parameters keep their names. What `torch.compile` has
            made of it computes with the adapter, too, which is on the model within.
        strategy: the recipe.
        name: the adapter's name, part of its parameters' names (`q_proj.deltas.<name>.A`).
        modules_to_train: modules of the base that are trained whole beside the strategy, a new head for example; or
            single parameters, by their full names.
        keep_base: keep the base's values beside those trained in place even where that is the whole base, so that the
            adapter can be switched off.

    Raises:
        UserError: a name matches nothing, nothing would be trained, or the model stands in another wrapper.
    """
    model = plain_model(model)
    if not name or "." in name:
        raise UserError(f"An adapter's name is not empty and has no dot; got {name!r}.")
    with turn(model, short=True), unchanged_on_error(model):
        model.requires_grad_(False)
        single = [entry for entry in modules_to_train if entry in dict(model.named_parameters())]
        heads = matching(model, [entry for entry in modules_to_train if entry not in single])
        trained = list(dict.fromkeys([*heads, *trained_by(strategy, model)]))
        order = max((other.order for other in adapters_on(model)), default=-1) + 1
        adapter = Adapter(name, model, strategy, trained=trained, heads=heads, order=order)
        _refuse_quantized(adapter)
        _refuse_lost_values(adapter, keep_base)
        _train_in_place(adapter, keep_base)
        for site, delta in deltas_of(strategy, model):
            module = model.get_submodule(site)
            install(module, name, _placed(delta, module))
            adapter.sites[site] = delta
        if single:
            adapter.train_also(single)  # after the deltas, for they may lie beneath one
        if not adapter.parameters():
            raise UserError(f"{type(strategy).__name__} would train nothing on this {type(model).__name__}.")
        set_adapters(model, [*adapters_on(model), adapter])
    return adapter


def _refuse_quantized(adapter: Adapter) -> None:
    """A packed weight has no gradient; and bitsandbytes rounds the bias of such a layer to what it computes in."""
    owners = {name: adapter.model.get_submodule(name.rpartition(".")[0]) for name in adapter.parameters()}
    packed = [name for name, module in owners.items() if is_quantized(module)]
    if packed:
        raise UserError(
            f"{type(adapter.strategy).__name__} would train {listed(packed, 3)} in place, and these layers are "
            "quantized, so that they stay as they are. Choose a strategy that adds to them, such as LoRA, keep the "
            "layers out of the quantization (keep), or leave the base unquantized."
        )


def _refuse_lost_values(adapter: Adapter, keep_base: bool) -> None:
    """See that what other adapters hold of the base's tensors can still be told from what this one trains."""
    adapter._refuse_merged_and_trained()
    keeps, own = adapter.strategy.restorable or keep_base, adapter.parameters()
    for other in () if keeps else adapters_on(adapter.model):
        if shared := [name for name in other.originals if name in own]:
            raise UserError(
                f"{type(adapter.strategy).__name__} would train {listed(shared, 3)} without keeping the values of the "
                f"adapter {other.name!r}, so that this one could not be saved or taken off any more. Remove it first, "
                "or attach with keep_base=True."
            )


def _train_in_place(adapter: Adapter, keep_base: bool) -> None:
    if adapter.strategy.restorable or keep_base:
        adapter.originals = {name: value.clone() for name, value in adapter.state().items()}
    for parameter in adapter.parameters().values():
        parameter.requires_grad_(True)


def _placed(delta: Delta, module: nn.Module) -> Delta:
    """The delta in its module's mode and on its device; in float32, or in float64 where the base is."""
    delta.train(module.training)
    beside = next(iter(module.parameters()), None)
    if beside is None:
        return delta
    return delta.to(beside.device, torch.float64 if beside.dtype == torch.float64 else torch.float32)


def _owned(names: Iterable[str], sites: Iterable[str], trained: Iterable[str], name: str) -> set[str]:
    """Those of the names that belong to an adapter of that name."""
    names = list(names)
    refuse_inner_wrappers(names)
    whole = tuple(f"{module}." for module in trained if module)
    exact = set(trained)
    prefixes = tuple(_prefix(site, name) for site in sites) + whole
    base = {key for key in names if CHILD not in key.split(".")} if "" in exact else set()
    return base | {key for key in names if key in exact or key.startswith(prefixes)}


def _prefix(site: str, name: str) -> str:
    return f"{site}.{CHILD}.{name}.".lstrip(".")
