"""Whether a delta of the user's computes what it says by `fold` or `factors`: both are tried on random inputs.

Ours are held to it by tests. Of a user's nothing else would tell, where `forward` was changed and `fold` inherited.
"""

import copy
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.class_paths import is_ours
from peftlight.delta import Base, Delta, with_product
from peftlight.errors import UserError
from peftlight.linear import is_conv1d, is_linear, is_quantized

_SHARE, _ROUNDING = 1e-3, 1e-6
"""How far the outputs may be apart, as shares of what the delta changes, and of the outputs."""


def is_of_user(delta: Delta) -> bool:
    """Whether its class, or one within it, is not of peftlight."""
    return not all(is_ours(type(one)) for one in delta.modules() if isinstance(one, Delta))


class WrongFold(UserError):
    """A delta folds into another weight than the one that computes the same."""


@torch.no_grad()
def check_fold(delta: Delta, module: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """See that the bare module with the folded weight computes what it does with the delta, if that folds at all.

    Linear layers and embeddings are tried.

    Args:
        delta: what folds.
        module: what it is on.
        weight: the module's, as `Delta.fold` takes it.
        bias: the module's; None where it has none.

    Raises:
        WrongFold: it computes something else.
    """
    inputs = None if is_quantized(module) else _inputs(module, weight)
    if inputs is None:
        return
    weight, bias = weight.double(), None if bias is None else bias.double()
    own = copy.deepcopy(delta).to(weight.device).double().eval()
    own.enabled = True
    bare = _with(module, weight, bias)
    try:
        expected, plain = own(Base(bare, bare.forward, True), inputs), bare.forward(inputs)
    except Exception:  # it wants more than the layer's input, so it cannot be tried here
        return
    for how, (changed, then) in _folds(own, weight, bias).items():
        apart = (_with(module, changed, then).forward(inputs) - expected).norm()
        effect = (expected - plain).norm()
        if not apart <= _SHARE * effect + _ROUNDING * expected.norm():
            raise WrongFold(_told(type(delta), how, float(apart / effect.clamp(min=1e-30))))


def _folds(delta: Delta, weight: Tensor, bias: Tensor | None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Weight and bias by what the delta says in each way."""
    factors = delta.factors()
    found = {} if factors is None else {"factors": (with_product(weight, factors), bias)}
    with suppress(UserError):  # no weight does what it does
        found["fold"] = delta.fold(weight, bias)
    return found


def _told(kind: type[Delta], how: str, apart: float) -> str:
    owner = next(one for one in kind.__mro__ if how in vars(one))
    inherited = "" if owner is kind else f" It is inherited from {owner.__name__}: write it in {kind.__name__} too."
    return (f"{kind.__name__}.{how} is not what {kind.__name__}.forward computes: on random inputs the two are apart "
            f"by {apart:.2g} of what the delta changes.{inherited}")  # fmt: skip


def _inputs(module: nn.Module, weight: Tensor) -> Tensor | None:
    """For the module, (2, 3, in) or tokens (2, 3); None for a kind of module that is not tried."""
    draw = torch.Generator().manual_seed(0)
    if isinstance(module, nn.Embedding):
        return torch.randint(module.num_embeddings, (2, 3), generator=draw).to(weight.device)
    if not is_linear(module):
        return None
    return torch.randn(2, 3, weight.shape[1], generator=draw, dtype=torch.float64).to(weight.device)


def _with(module: nn.Module, weight: Tensor, bias: Tensor | None) -> Any:
    """The module without deltas, and with these parameters; the module itself stays as it is."""
    bare = copy.copy(module)
    bare.__dict__ = {name: value for name, value in module.__dict__.items() if name != "forward"}
    bare._modules, bare._forward_pre_hooks, bare._forward_hooks = {}, {}, {}
    held = {"weight": weight.T if is_conv1d(module) else weight, "bias": bias}
    bare._parameters = {name: None if value is None else nn.Parameter(value) for name, value in held.items()}
    return bare
