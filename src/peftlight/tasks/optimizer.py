"""The optimizer of a run, with one group for each learning rate that the strategy asks for, and its schedule."""

import math
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from peftlight.errors import UserError, listed
from peftlight.strategy import Adapter
from peftlight.tasks.parameter_groups import is_plain, treat
from peftlight.tasks.planned_steps import planned_steps
from peftlight.tasks.schedule import LinearWarmup, steps_of
from peftlight.tasks.search import check_taken, with_rate
from peftlight.tasks.trial_step import refuse_unable

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
        optimizer = new_optimizer(module, module.adapter)
    except (ValueError, TypeError, RuntimeError) as error:
        matrices_alone = "Muon" in str(error) and "; MuonAndAdamW takes the rest too: --optimizer MuonAndAdamW"
        raise UserError(f"The optimizer refuses its settings: {error}{matrices_alone or ''}") from error
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = _schedule(module, optimizer)
    check_taken(optimizer, rates, scheduler, module.learning_rate)
    if getattr(module.trainer.precision_plugin, "scaler", None) is not None:
        # The schedule is planned over all steps, those that the scaler skips too; torch takes it for a slip.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    if isinstance(scheduler, ReduceLROnPlateau):
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}
    plan_by_steps(module, [scheduler])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _schedule(module: "PEFTModule", optimizer: Optimizer) -> Any:
    before = [group["lr"] for group in optimizer.param_groups]
    try:
        scheduler = module.lr_scheduler(optimizer)
    except (ValueError, TypeError, RuntimeError) as error:
        if None in before:
            relative = any(group.get("relative_step") for group in optimizer.param_groups)
            raise UserError(
                f"{type(optimizer).__name__} finds its own learning rate (its lr is null), and the lr_scheduler moves "
                f"one. Set --optimizer.lr{' with --optimizer.relative_step false' if relative else ''}, or choose a "
                "schedule that reads the optimizer's own: --lr_scheduler transformers.optimization.AdafactorSchedule."
            ) from error
        raise UserError(f"The lr_scheduler refuses its settings: {error}") from error
    after = [group["lr"] for group in optimizer.param_groups]
    if len(set(before)) > 1 and len(set(after)) == 1 and after[0]:
        raise UserError(
            f"{type(scheduler).__name__} gives all parameters one learning rate, {after[0]:.3g}, and here they have "
            f"several, by the strategy or by model.learning_rates: {listed(f'{rate:.3g}' for rate in before)}. Give "
            "its rates as a list, one for each of these groups, or choose a schedule that multiplies them, such as "
            "--lr_scheduler LinearWarmup."
        )
    return scheduler


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


def new_optimizer(module: "PEFTModule", adapter: Adapter) -> Optimizer:
    """The optimizer of those parameters that train, with what the strategy and the user ask for some of them.

    Raises:
        UserError: it cannot take a step with such parameters and these settings.
    """
    groups = module.group_options.groups(module, adapter)
    refuse_unable(module.optimizer, groups)
    make = with_rate(module.optimizer, module.learning_rate)
    return _remarked(treat(make(groups[0]["params"] if is_plain(groups) else groups)))


def _remarked(optimizer: Optimizer) -> Optimizer:
    on_card = any(parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"])
    if getattr(optimizer, "is_paged", False) and not on_card:
        warnings.warn(
            f"{type(optimizer).__name__} is paged only beside a CUDA card. Here the optimizer's state is kept in "
            "ordinary memory; the numbers are the same.",
            stacklevel=2,
        )
    return optimizer
