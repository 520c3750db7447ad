"""The optimizer of a run, with one group for each learning rate that the strategy asks for, and its schedule."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from peftlight.errors import UserError
from peftlight.strategy import Adapter
from peftlight.tasks.planned_steps import planned_steps
from peftlight.tasks.schedule import LinearWarmup, steps_of
from peftlight.tasks.search import check_taken, with_rate

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule

DEFAULT_LEARNING_RATE = 2e-4


def default_optimizer(parameters: Any) -> Optimizer:
    """AdamW at the default learning rate."""
    return AdamW(parameters, lr=DEFAULT_LEARNING_RATE)


def optimizer_and_schedule(module: "PEFTModule") -> OptimizerLRScheduler:
    """What a task trains with, as Lightning takes it: the schedule moves per step, or with val_loss.

    Raises:
        UserError: one of them refuses its settings, or the schedule needs a number of steps that is not known.
    """
    assert module.adapter is not None
    try:
        make = with_rate(module.optimizer, module.learning_rate)
        optimizer = new_optimizer(make, module.parameters(), module.adapter)
        rates = [group["lr"] for group in optimizer.param_groups]
        scheduler = module.lr_scheduler(optimizer)
    except (ValueError, TypeError) as error:
        raise UserError(f"The optimizer or the lr_scheduler refuses its settings: {error}") from error
    check_taken(optimizer, rates, scheduler, module.learning_rate)
    if getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        # The schedule is planned over all steps, those that the scaler skips too; torch takes it for a slip.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
    plan_by_steps(module, [scheduler])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def plan_by_steps(module: "PEFTModule", schedulers: Iterable[Any]) -> None:
    """Have schedules plan by the steps that the training will have, as it stands now.

    Raises:
        UserError: that number is not known, or one was given that is over before the training is.
    """
    for scheduler in schedulers:
        if isinstance(scheduler, LinearWarmup) and scheduler.follows:
            scheduler.plan(module.total_steps())
        elif (given := steps_of(scheduler)) is not None:
            steps = planned_steps(module.trainer)
            if steps is not None and given < steps < math.inf:
                left_out = isinstance(scheduler, LinearWarmup)
                raise UserError(
                    f"{type(scheduler).__name__}'s total_steps is {given}, and the training has {steps} steps: there "
                    f"is no learning rate for those after step {given}. Set --lr_scheduler.total_steps {steps}"
                    f"{', or leave it out' if left_out else ''}, or --trainer.max_steps {given}."
                )


def new_optimizer(make: Callable[[Any], Optimizer], parameters: Iterable[nn.Parameter], adapter: Adapter) -> Optimizer:
    """The optimizer of those parameters that train, with the strategy's factors on its learning rate."""
    factors = adapter.strategy.learning_rates(adapter)
    factor_of = {id(parameter): factors.get(name, 1.0) for name, parameter in adapter.parameters().items()}
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault(factor_of.get(id(parameter), 1.0), []).append(parameter)
    if set(groups) == {1.0}:
        return _remarked(make(groups[1.0]))
    optimizer = _remarked(make([{"params": group} for group in groups.values()]))
    for group, factor in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = group["lr"] * factor
    return optimizer


def _remarked(optimizer: Optimizer) -> Optimizer:
    on_card = any(parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"])
    if getattr(optimizer, "is_paged", False) and not on_card:
        warnings.warn(
            f"{type(optimizer).__name__} is paged only beside a CUDA card. Here the optimizer's state is kept in "
            "ordinary memory; the numbers are the same.",
            stacklevel=2,
        )
    return optimizer
