"""Activation functions by the names that configurations use."""

from collections.abc import Callable
from functools import partial

from torch import nn

from peftlight.errors import UserError, listed, nearest

_OF_ONE_INPUT = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.RReLU, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softshrink,
    nn.Softsign, nn.Tanh, nn.Tanhshrink,
)  # fmt: skip
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {kind.__name__.lower(): kind for kind in _OF_ONE_INPUT}
_ACTIVATIONS |= {"swish": nn.SiLU, "gelu_new": partial(nn.GELU, approximate="tanh")}


def activation_named(name: str) -> Callable[[], nn.Module]:
    """What makes the activation of that name: one of torch.nn, with or without underscores, or swish or gelu_new.

    Raises:
        UserError: there is none.
    """
    plain = name.lower()
    found = _ACTIVATIONS.get(plain) or _ACTIVATIONS.get(plain.replace("_", ""))
    if found is None:
        names = sorted(_ACTIVATIONS)
        raise UserError(f"activation: {name!r} is not known.{nearest(name, names)} There are {listed(names, 30)}.")
    return found
