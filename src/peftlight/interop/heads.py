"""Heads of other sizes: an adapter brings its own classes to a base that was made for another number of them."""

from torch import Tensor, nn

from peftlight.errors import UserError, listed
from peftlight.interop.contents import Tensors
from peftlight.interop.hf.names import without_prefix
from peftlight.strategy import Adapter


def make_room(model: nn.Module, tensors: Tensors) -> dict[str, Tensor]:
    """Give parameters of the model the shapes of an adapter's file, where only the number of outputs differs.

    Returns: what those parameters held, by their names.
    """
    held, parameters = {}, dict(model.named_parameters())
    for key, value in tensors.items():
        plain = without_prefix(key)
        parameter = parameters.get(plain)
        if parameter is None or parameter.shape == value.shape or parameter.shape[1:] != value.shape[1:]:
            continue
        held[plain] = parameter.data
        parameter.data = parameter.data.new_zeros(value.shape)
    return held


def keep_held(adapter: Adapter, held: dict[str, Tensor]) -> None:
    """Let the adapter give back what `make_room` took when it is switched off or removed.

    Raises:
        UserError: the adapter does not train it.
    """
    if strays := sorted(held.keys() - adapter.originals.keys()):
        raise UserError(f"{listed(strays)} have other shapes in the model, and the adapter does not train them.")
    adapter.originals |= held
