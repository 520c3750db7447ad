"""What a training that ended before its planned number of steps has left undone."""

from typing import TYPE_CHECKING

from peftlight.tasks.schedule import steps_of

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


def unmet_plans(module: "PEFTModule") -> list[str]:
    """One sentence or more for each plan that was to go on; none where every planned step was taken."""
    trainer, unmet = module.trainer, []
    if getattr(trainer, "fast_dev_run", 0):
        return []
    assert module.adapter is not None
    done, steps = trainer.global_step, module.planned_steps
    if module.strategy.uses("unmet") and steps is not None and done < steps < float("inf"):
        unmet.append(module.strategy.unmet(module.adapter, done, int(steps)))
    for config in trainer.lr_scheduler_configs:
        total = steps_of(config.scheduler)
        if total is not None and done < total:
            now = config.scheduler.optimizer.param_groups[0]["lr"]
            unmet.append(
                f"{type(config.scheduler).__name__} planned the learning rate over {total} steps, and the training "
                f"ended after {done}, where it was {now:.3g}."
            )
    return [sentence for sentence in unmet if sentence]
