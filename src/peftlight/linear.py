"""The one home of kinds of linear layer: which there are, and how wide they are."""

from torch import nn

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
