"""What of a model is put together at a time while it computes: its blocks, and what lies around them."""

from torch import nn

from peftlight.blocks import blocks_of
from peftlight.errors import UserError


def units_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks by their paths, and last the model itself."""
    try:
        paths = [block.path for block in blocks_of(model)]
    except UserError:  # no blocks: the model is one unit
        paths = []
    return {path: model.get_submodule(path) for path in (*paths, "")}


def indivisible(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that several units share, and those of a single number: they cannot be sharded with a unit."""
    units, owners = units_of(model), dict[nn.Parameter, set[str]]()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = next(path for path in units if f"{name}.".startswith(f"{path}." if path else ""))
        owners.setdefault(parameter, set()).add(owner)
    return {parameter for parameter, paths in owners.items() if len(paths) > 1 or parameter.dim() == 0}
