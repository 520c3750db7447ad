"""A micro-batch of an optimizer step, kept until the step is taken so that it can be computed once more."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


class MicroBatch:
    """A batch on its device, with the random state in which it was computed and what its loss was."""

    def __init__(self, batch: Mapping[str, Any], device: torch.device) -> None:
        self.batch, self.device = copy(batch), device  # a user's loss may take labels out of it
        self.loss: Tensor | None = None
        self.random_state = torch.get_rng_state()
        self.random_state_of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def as_it_was(self, trainer: Trainer) -> Iterator[None]:
        """Within the block random numbers and precision are those of its training step; afterwards as before."""
        with torch.random.fork_rng([self.device] if self.random_state_of_gpu is not None else []):
            torch.set_rng_state(self.random_state)
            if self.random_state_of_gpu is not None:
                torch.cuda.set_rng_state(self.random_state_of_gpu, self.device)
            with trainer.precision_plugin.train_step_context():
                yield

    def tensors(self) -> dict[str, Tensor]:
        """What of the batch is tensors."""
        return {key: value for key, value in self.batch.items() if isinstance(value, Tensor)}

    def rows(self) -> list[int]:
        """The ids of its rows, or their places in the batch where they have none."""
        ids = self.batch.get("row", torch.arange(len(next(iter(self.tensors().values())))))
        return [int(row) for row in ids]
