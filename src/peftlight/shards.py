"""Tensors that are sharded over processes: the part that is here, the whole, and back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(what: Tensor | nn.Module) -> bool:
    """Whether each process holds a part only of the tensor, or of a parameter of the module."""
    if isinstance(what, nn.Module):
        return any(is_sharded(parameter) for parameter in what.parameters())
    return hasattr(what, "full_tensor")


def class_name(module: nn.Module) -> str:
    """The module's class, without the word that sharding puts before it."""
    return type(module).__name__.removeprefix("FSDP" if is_sharded(module) else "")


def whole(tensor: Tensor) -> Tensor:
    """All of the tensor; of one that is sharded, every process has to ask for it."""
    all_of_it: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return all_of_it


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds, in the same memory."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def sharded_like(value: Tensor, like: Tensor) -> Tensor:
    """A value that every process has, laid out as `like` is; nothing is sent."""
    if not is_sharded(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def unsharded(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """By each parameter that FSDP2 has sharded in the model, the whole tensor with which the model computes."""
    found = {}
    for module in model.modules():
        if state := getattr(module, "_get_fsdp_state", None):  # private: the model shows them only in a forward
            for group in state()._fsdp_param_groups:
                found.update({p.sharded_param: p.unsharded_param for p in group.fsdp_params})
    return found


def first_position(tensor: Tensor) -> int:
    """The place that the first number of the part here has in the whole tensor, row after row."""
    if not is_sharded(tensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, mesh, placements = tensor.shape, tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    offset = compute_local_shape_and_global_offset(shape, mesh, placements)[1]
    return sum(start * step for start, step in zip(offset, tensor.stride(), strict=True))


def summed_over_shards(totals: Tensor, tensors: Iterable[Tensor]) -> Tensor:
    """(n,): of each of the n tensors a total, summed over the processes where the tensor is sharded."""
    sharded = torch.tensor([is_sharded(tensor) for tensor in tensors], device=totals.device)
    if sharded.any():
        summed = totals.clone()
        dist.all_reduce(summed)
        totals = torch.where(sharded, summed, totals)
    return totals


@contextmanager
def gathered(model: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within the block, these parameters of the model are whole in every process; all have to enter it.

    The model cannot compute meanwhile, and what is written into the parameters is lost.
    """
    wholes = {p: nn.Parameter(whole(p.detach()), p.requires_grad) for p in parameters if is_sharded(p)}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter in wholes
    ]
    try:
        for module, name, parameter in places:
            module.register_parameter(name, wholes[parameter])
        yield
    finally:
        for module, name, parameter in places:
            module.register_parameter(name, parameter)
