"""What each process has, told to all of them."""

from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def gathered(own: T) -> list[T]:
    """What every process has, in their order; each of them has to call it. It travels pickled."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts
