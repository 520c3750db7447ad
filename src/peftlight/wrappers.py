"""What others put around a model: the wrapper of `torch.compile` is seen through, others are refused by name."""

from collections.abc import Iterable

from torch import nn

from peftlight.errors import UserError
from peftlight.shards import is_sharded

_COMPILED = "_orig_mod"
"""Name of the child by which the wrapper of `torch.compile` holds the module."""
_COPIES = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "_FabricModule")
"""Classes that hold a model as their child, and took hold of its parameters when they were made."""


def seen_through(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped, or the model itself where there is no wrapper."""
    while _COMPILED in model._modules:
        model = model.get_submodule(_COMPILED)
    return model


def plain_model(model: nn.Module) -> nn.Module:
    """The model itself, on which an adapter can be put; what was compiled computes with the adapter, too.

    Raises:
        UserError: it stands in another wrapper, or a wrapper stands within it, so that names in it are not those of
            the model that an adapter is loaded on; or its parameters are sharded already.
    """
    model = seen_through(model)
    kinds = [kind for kind in _COPIES if kind in {each.__name__ for each in type(model).__mro__}]
    if kinds:
        raise UserError(
            f"The model stands in a {kinds[0]}, which would learn nothing of the adapter's parameters. Put the adapter "
            "on the model first, and that into the wrapper."
        )
    if hasattr(model, "_c"):  # TorchScript
        raise UserError(
            f"This {type(model).__name__} is compiled by torch.jit, and takes no adapter. Put it on the model from "
            "which this was made."
        )
    refuse_inner_wrappers(name for name, _ in model.named_modules())
    if is_sharded(model):
        raise UserError(
            f"This {type(model).__name__} is sharded over processes already, and the adapter's parameters would be in "
            "none of the shards. Put the adapter on the model first, and shard it then."
        )
    return model


def refuse_inner_wrappers(names: Iterable[str]) -> None:
    """See that no name in a model goes through a wrapper of `torch.compile`.

    Raises:
        UserError: one does.
    """
    inner = next((name for name in names if f".{_COMPILED}." in f".{name}."), None)
    if inner is not None:
        path = f".{inner}.".partition(f".{_COMPILED}.")[0].strip(".")
        raise UserError(
            f"The module {path!r} stands in the wrapper that torch.compile makes, and no other copy of the model would "
            "have the names of its tensors. Compile it in place: module.compile() instead of torch.compile(module)."
        )


def without_wrapper(name: str) -> str:
    """The name of a tensor in the model itself."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)
