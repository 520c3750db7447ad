"""A delta is a small trainable change around the forward of one module; here it is put on and taken off.

The module keeps its class, its parameters and their names. Its `forward` is overridden on the instance, and the
delta is its child `deltas.<adapter name>`; taking the last delta away leaves the module as it was.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.class_paths import is_ours
from peftlight.errors import UserError

CHILD = "deltas"
"""Name of the child module that holds a module's deltas."""
ADAPTERS = "peftlight_adapters"
"""Where a model keeps the list of its adapters; a copy of the model has copies of them."""
Factors = tuple[Tensor, Tensor]
"""A (rank, in) and B (out, rank), of the product B A."""


@dataclass(slots=True)
class Base:
    """What a delta changes: the forward beneath it, and the module that it belongs to."""

    module: nn.Module
    """The adapted module, with its own untouched parameters."""
    call: Callable[..., Any]
    """The forward beneath this delta: the module's own, or that of the delta attached before."""
    direct: bool
    """True when `call` is the module's own forward, so that an operation may use `module.weight` itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


class Delta(nn.Module):
    """A small trainable change around the forward of one module.

    A subclass creates its parameters in `__init__` and writes its equation in `forward`.
    """

    enabled: bool = True
    in_float32: tuple[str, ...] = ()
    """What stays in float32 where the delta is put into half precision (`adapter_dtype`): names below it, "" for all.

    It is needed for what starts near one: half precision has no number between 1 and 0.996 or 1.008, so that the steps
    of a training are lost. Every module within a delta may have this attribute for its own part.
    """
    reads_weight: bool = False
    """Whether what this adds depends on the module's weight, so that it folds into that weight alone."""

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        """The module's new output, from `base` (the forward beneath) and the module's inputs."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def fold(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias with which the bare module computes what it computes with this delta.

        Args:
            weight: of a linear layer as (out, in), of others as stored; in float32 or float64.
            bias: (out,), or None where the module has none.

        Raises:
            UserError: no weight does that; this is so unless a subclass says how, here or in `factors`.
        """
        factors = self.factors()
        if factors is None:
            raise UserError(f"{type(self).__name__} cannot be merged: no weight of the module computes the same.")
        return with_product(weight, factors), bias

    @property
    def folds(self) -> bool:
        """Whether it says how it is folded into the weight, with `fold` or `factors`."""
        return type(self).fold is not Delta.fold or self.factors() is not None

    def factors(self) -> Factors | None:
        """A and B, if what this adds to the weight is B A, whatever the weight is; otherwise None.

        The weight is meant as `fold` takes it, with all dimensions after the first as one.
        """
        return None

    def finished(self) -> "Delta":
        """A delta that computes the same without what only training needed; it is what gets saved."""
        return self

    def put_into(self, dtype: torch.dtype) -> None:
        """Put its numbers into this format, in place, except for those that are to stay in float32."""
        kept = {id(tensor) for module in self.modules() for name in getattr(module, "in_float32", ())
                for tensor in _below(module, name)}  # fmt: skip
        for tensor in _below(self, ""):
            if tensor.is_floating_point() and id(tensor) not in kept:
                tensor.data = tensor.data.to(dtype)

    def check_length(self, tokens: int) -> None:
        """Called before the first step with the length of the longest row, where the data knows it.

        Raises:
            UserError: the model has no positions left for such a row beside what this adds.
        """

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        """Make room for saved tensors, named as in `state_dict()`, where the shapes depend on data."""


def finishes_another(delta: Delta) -> bool:
    """Whether a class of the user's has a `forward` of its own, and `finished` from a class with another."""
    for one in (each for each in delta.modules() if isinstance(each, Delta)):
        owners = [next(kind for kind in type(one).__mro__ if hook in vars(kind)) for hook in ("forward", "finished")]
        forward, finished = map(type(one).__mro__.index, owners)
        if finished > forward and owners[1] is not Delta and not is_ours(type(one)):
            return True
    return False


def _below(module: nn.Module, name: str) -> list[Tensor]:
    """The parameters and buffers of that name, or below it."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [tensor for key, tensor in named if not name or f"{key}.".startswith(f"{name}.")]


def with_product(weight: Tensor, factors: Factors) -> Tensor:
    """The weight, as `Delta.fold` takes it, with B A added."""
    A, B = (factor.to(weight) for factor in factors)
    return weight + (B @ A).view(weight.shape)


class AdaptedForward:
    """The `forward` of a module that carries deltas; they nest in the order in which they were attached."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.replaced: Callable[..., Any] | None = module.__dict__.get("forward")

    @property
    def own(self) -> Callable[..., Any]:
        """The forward that was there before the first delta."""
        return self.replaced or type(self.module).forward.__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return nested(Base(self.module, self.own, True), _deltas_of(self.module).values())(*args, **kwargs)


def nested(base: Base, deltas: Iterable[Delta]) -> Callable[..., Any]:
    """The forward that `base` has with these deltas around it, the innermost first; those switched off left out."""
    call, direct = base.call, base.direct
    for delta in deltas:
        if delta.enabled:
            call, direct = _Nested(delta, Base(base.module, call, direct)), False
    return call


@dataclass(slots=True)
class _Nested:
    delta: Delta
    base: Base

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.delta(self.base, *args, **kwargs)


def install(module: nn.Module, name: str, delta: Delta) -> None:
    """Put `delta` around the forward of `module` under the adapter's `name`.

    Raises:
        UserError: the module already carries a delta of that name.
    """
    if not isinstance(module.__dict__.get("forward"), AdaptedForward):
        module.add_module(CHILD, _container().train(module.training))
        module.forward = AdaptedForward(module)
    deltas = _deltas_of(module)
    if name in deltas:
        raise UserError(f"An adapter named {name!r} is already attached to this {type(module).__name__}.")
    deltas[name] = delta


def _deltas_of(module: nn.Module) -> Any:
    return module.get_submodule(CHILD)


def _container() -> nn.ModuleDict:
    """Where a module's deltas are kept.

    Its hook never runs, for the container is never called. It is there to be seen: in eval mode
    `nn.TransformerEncoderLayer` computes from its layers' weights, past their forwards and so past the deltas, unless
    a module within it has a hook.
    """
    container = nn.ModuleDict()
    container.register_forward_pre_hook(_never_called)
    return container


def _never_called(module: nn.Module, inputs: Any) -> None:
    raise AssertionError("the container of the deltas has no forward")


def beneath(module: nn.Module, name: str) -> list[str]:
    """Names of the enabled deltas that lie between the module's own forward and the delta of that name."""
    names = list(_deltas_of(module))
    return [other for other in names[: names.index(name)] if _deltas_of(module)[other].enabled]


def remove(module: nn.Module, name: str) -> Delta:
    """Take the delta of that name away and return it; with the last one the module is as it was before."""
    deltas = _deltas_of(module)
    delta = deltas.pop(name)
    if not deltas:
        adapted: AdaptedForward = module.__dict__.pop("forward")
        delattr(module, CHILD)
        if adapted.replaced is not None:
            module.forward = adapted.replaced
    return delta


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """If the block fails, take off the adapters it attached, and give parameters their old form and trainability.

    The values of parameters are not kept: the block must not write them before it is sure to succeed.
    """
    parameters = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    installed, adapters = _installed(model), model.__dict__.get(ADAPTERS)
    try:
        yield
    except BaseException:
        for module, name in _installed(model) - installed:
            remove(module, name)
        set_adapters(model, adapters or [])
        for parameter, data, trainable in parameters:
            if (parameter.dtype, parameter.shape) != (data.dtype, data.shape):
                parameter.data = data
            parameter.requires_grad_(trainable)
        raise


def set_adapters(model: nn.Module, adapters: list[Any]) -> None:
    """Note which adapters are on the model; where there are none, nothing is left of the list."""
    if adapters:
        model.__dict__[ADAPTERS] = adapters
    else:
        model.__dict__.pop(ADAPTERS, None)


def _installed(model: nn.Module) -> set[tuple[nn.Module, str]]:
    adapted = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), AdaptedForward)]
    return {(module, name) for module in adapted for name in _deltas_of(module)}
