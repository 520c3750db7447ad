"""The one home of kinds of linear layer: which there are, how wide they are, and how their weight lies in memory."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.errors import UserError


def is_linear(module: nn.Module) -> bool:
    """True for `nn.Linear` and its subclasses, and for GPT-2's `Conv1D`, which stores its weight as (in, out)."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """True for the transposed linear layer of GPT-2 (known by what it has, so that transformers is not imported)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and getattr(module, "weight", None) is not None


def is_quantized(module: nn.Module) -> bool:
    """True for the 4-bit and 8-bit layers of bitsandbytes (known by what they have, so that it is not imported)."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and hasattr(module, "weight")


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


def numbers_in(model: nn.Module) -> int:
    """How many numbers the model's parameters hold; of those that lie packed in bytes, as many as they stand for."""
    packed = [module for module in model.modules() if is_quantized(module)]
    held = sum(inputs * outputs for inputs, outputs in map(widths, packed))
    return sum(p.numel() for p in model.parameters()) + held - sum(m.get_parameter("weight").numel() for m in packed)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in), detached; of an embedding or convolution as it is stored.

    Of a layer that bitsandbytes quantized it is what the layer computes with, made anew at each call.

    Raises:
        UserError: the weight is stored quantized, so that it cannot be read as numbers: as integers, or as eight-bit
            floats, which have their scale elsewhere.
    """
    if is_quantized(module):
        return _dequantized(module)
    own: Tensor = module.weight  # type: ignore[assignment]  # not a parameter where others make it (parametrizations)
    weight = own.detach()
    if not weight.is_floating_point() or weight.element_size() < 2:
        raise UserError(f"The weight of this {type(module).__name__} is quantized ({weight.dtype}).")
    return weight.T if is_conv1d(module) else weight


def _dequantized(module: Any) -> Tensor:
    functional: Any = sys.modules["bitsandbytes.functional"]  # whoever made the layer has imported it
    weight = module.weight.detach()
    if type(module).__name__ == "Linear4bit":
        full: Tensor = functional.dequantize_4bit(weight, module.weight.quant_state)
        return full
    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
    codes = weight if module.state.CB is None else module.state.CB
    return codes.float() * scale.view(-1, 1) / 127


def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Copy a weight, laid out as `weight_of` gives it, into the module.

    Raises:
        UserError: the module is quantized, so that its weight would be rounded.
    """
    if is_quantized(module):
        raise UserError(f"The weight of this {type(module).__name__} is quantized; it takes no other.")
    with torch.no_grad():
        module.get_parameter("weight").copy_(weight.T if is_conv1d(module) else weight)
