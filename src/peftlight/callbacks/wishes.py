"""What one process wishes, known to all of them at the same place of the training."""

from typing import Any

import torch
import torch.distributed as dist


class Wishes:
    """Numbers of which every process learns the greatest.

    The messages go from CPU to CPU, so that no GPU is waited for.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._on_its_way: tuple[Any, torch.Tensor] | None = None

    def start(self) -> None:
        """Begin; all processes come here together."""
        self._on_its_way = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")

    @property
    def alone(self) -> bool:
        """Whether there is one process."""
        return self._group is None

    def greatest(self, wish: int) -> int:
        """The greatest of all; every process waits for the slowest."""
        if self._group is None:
            return wish
        number = torch.tensor(wish)
        dist.all_reduce(number, dist.ReduceOp.MAX, self._group)
        return int(number)

    def exchange(self, wish: int) -> int:
        """The greatest of those given in the call before, of which nobody has to wait for; alone, what is given."""
        if self._group is None:
            return wish
        known = self._arrived()
        number = torch.tensor(wish)
        self._on_its_way = dist.all_reduce(number, dist.ReduceOp.MAX, self._group, async_op=True), number
        return known

    def forget(self) -> None:
        """Have the next exchange know nothing of the one before; all processes come here together."""
        self._arrived()

    def stop(self) -> None:
        """End; all processes come here together."""
        self.forget()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _arrived(self) -> int:
        if self._on_its_way is None:
            return 0
        message, number = self._on_its_way
        message.wait()
        self._on_its_way = None
        return int(number)
