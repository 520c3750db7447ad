"""The base is loaded before the user's callbacks are set up: some copy or count the module there."""

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn

from peftlight.errors import UserError, listed
from peftlight.strategy import Adapter
from peftlight.tasks.task_callback import TaskCallback

_FIRST = (BatchSizeFinder, LearningRateFinder)
"""Lightning puts these before all others, whatever their place in the list."""


class EarlyBase(Callback):
    """Has a task load its base; stands behind peftlight's own callbacks and before the user's."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Outside of the device's context, in which Lightning calls `configure_model` later: averages copy on the CPU.

        Raises:
            UserError: a callback of Lightning's cannot work here.
        """
        # Lightning's, that the model would not be sharded; where it is to be, it is refused here.
        warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model that overrides")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        _refuse_sharded(trainer, callbacks)
        for callback in callbacks:
            if isinstance(callback, TaskCallback):
                callback.before_base(trainer, pl_module)  # type: ignore[arg-type]
        precision = trainer.precision_plugin
        with precision.tensor_init_context(), precision.module_init_context():
            pl_module.configure_model()
        pl_module.unfreezing.copied = False  # type: ignore[union-attr]  # of a training before
        _refuse_averages(callbacks, pl_module.adapter)  # type: ignore[arg-type]


def load_base_early(trainer: Any) -> None:
    """Put an `EarlyBase` among the trainer's callbacks, unless it has one."""
    callbacks: list[Callback] = trainer.callbacks
    if not any(isinstance(callback, EarlyBase) for callback in callbacks):
        users = (place for place, callback in enumerate(callbacks) if not is_ours(callback))
        callbacks.insert(next((place for place in users if not isinstance(callbacks[place], _FIRST)), len(callbacks)),
                         EarlyBase())  # fmt: skip


def is_ours(callback: Callback) -> bool:
    """Whether the callback's class is peftlight's."""
    return type(callback).__module__.startswith("peftlight.")


def _refuse_sharded(trainer: Trainer, callbacks: list[Callback]) -> None:
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return
    for kind, why in (
        ((WeightAveraging, StochasticWeightAveraging), "copies the model before it is sharded, and the average"),
        ((BaseFinetuning,), "unfreezes parts of the model in mid-run, and what trains"),
    ):
        if found := [type(callback).__name__ for callback in callbacks if isinstance(callback, kind)]:
            raise UserError(
                f"{listed(found)} does not go with fsdp2: it {why} would not fit the shards. Choose --trainer.strategy "
                "ddp, or leave the callback out."
            )


def _refuse_averages(callbacks: list[Callback], adapter: Adapter) -> None:
    """See that the mean of the weights of several steps means something.

    Raises:
        UserError: it does not.
    """
    averages = [call for call in callbacks if isinstance(call, WeightAveraging | StochasticWeightAveraging)]
    if not averages:
        return
    names = listed(type(callback).__name__ for callback in averages)
    if planned := [part for part in adapter.parts if part.strategy.uses("after_step")]:
        raise UserError(
            f"{names} does not go with {type(planned[0].strategy).__name__}, which removes parts of its matrices as "
            "the training goes on: an average over the steps would bring them back. Leave the callback out, or choose "
            "another strategy."
        )
    frozen = [name for name, module in adapter.model.named_modules()
              if isinstance(module, nn.modules.batchnorm._BatchNorm)
              and f"{name}.running_mean".lstrip(".") not in adapter.state()]  # fmt: skip
    if frozen and any(isinstance(callback, StochasticWeightAveraging) for callback in averages):
        raise UserError(
            f"StochasticWeightAveraging computes the running statistics of BatchNorm anew when it ends, and those of "
            f"{listed(frozen, 3)} belong to the frozen base. Choose lightning.pytorch.callbacks.WeightAveraging, which "
            "averages what trains alone."
        )
