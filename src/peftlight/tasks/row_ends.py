"""Several processes come to the end of their rows together, or say which of them has none left."""

import math
from typing import TYPE_CHECKING, Any

import torch

from peftlight.errors import UserError, listed
from peftlight.gather import gathered

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule

_SHARE = (
    "A loader whose rows Lightning does not share out, such as one of an IterableDataset, has to give each process as "
    "many batches: leave the last ones out, or give some rows twice."
)


class RowEnds:
    """Asks after each batch whether all processes have one more, where the loaders do not say how many they have.

    Not later: Lightning, and DDP in the forward pass, have the processes wait for each other as soon as a batch begins.
    """

    def __init__(self, module: "PEFTModule") -> None:
        self._module = module
        self._asks = False

    def start(self) -> None:
        """Compare the processes' numbers of batches, where these are known.

        Raises:
            UserError: they differ.
        """
        trainer = self._module.trainer
        batches = gathered(trainer.num_training_batches)
        self._asks = trainer.world_size > 1 and math.inf in batches
        if len(set(batches)) > 1:
            raise UserError(f"The processes have {listed(batches)} batches to train on, in their order: each needs as "
                            f"many as the others, which would wait for it. {_SHARE}")  # fmt: skip

    def batch_ends(self) -> None:
        """A batch is done, which may be the last one of this process's epoch.

        Raises:
            UserError: it is the last one of some processes, and others have more.
        """
        trainer = self._module.trainer
        if not self._asks:
            return
        own = torch.tensor(float(trainer.is_last_batch), device=self._module.device)
        ended = round(float(trainer.strategy.reduce(own.clone(), reduce_op="sum")))
        if 0 < ended < trainer.world_size:
            batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            has = "no rows left" if own else "more rows, unlike another process,"
            raise UserError(f"Process {trainer.global_rank} has {has} after {batches.ready} batches of this epoch; the "
                            f"processes need as many batches, or some would wait for others. {_SHARE}")  # fmt: skip
