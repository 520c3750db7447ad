"""The one home of kinds of linear layer: which there are, how wide they are, and how their weight lies in memory."""

import torch
from torch import Tensor, nn

from peftlight.errors import UserError


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and its subclasses, and for GPT-2's `Conv1D`, which stores its weight as (in, out)."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """True for the transposed linear layer of GPT-2 (known by what it has, so that transformers is not imported)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def widths(module: nn.Module) -> tuple[int, int]:
    """(in features, out features) of a linear layer.

    Raises:
        UserError: the module is not a linear layer.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        inputs, outputs = module.get_parameter("weight").shape
        return inputs, outputs
    raise UserError(f"{type(module).__name__} is not a linear layer; expected nn.Linear or GPT-2's Conv1D.")


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), detached; of an embedding or convolution as it is stored.

    Raises:
        UserError: the weight is stored quantized, so that it cannot be read as numbers: as integers, or as eight-bit
            floats, which have their scale elsewhere.
    """
    weight = module.get_parameter("weight").detach()
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise UserError(f"The weight of this {type(module).__name__} is quantized ({weight.dtype}).")
    return weight.T if is_conv1d(module) else weight


def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy a weight, laid out as `weight_of` gives it, into the module."""
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight.T if is_conv1d(module) else weight)
