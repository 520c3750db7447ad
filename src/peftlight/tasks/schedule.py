"""The default learning-rate schedule."""

from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from peftlight.errors import UserError
from peftlight.tasks.added_groups import follow


class LinearWarmup(LambdaLR):
    """The learning rate rises linearly over the first share of the steps, then falls linearly towards zero."""

    def __init__(self, optimizer: Optimizer, warmup: float = 0.06, total_steps: int | None = None) -> None:
        """
        Args:
            optimizer: whose learning rate is scheduled.
            warmup: share of all steps in which the rate rises, from 0 up to 1.
            total_steps: all optimizer steps of the run; left out, it follows the trainer's limits and what happens.
        """
        if total_steps is not None and total_steps < 1:
            raise UserError(f"LinearWarmup's total_steps is at least 1; got {total_steps}.")
        if not 0 <= warmup <= 1:
            raise UserError(f"LinearWarmup's warmup is a share of all steps, from 0 to 1; got {warmup}.")
        self.warmup, self.total_steps = warmup, total_steps
        self.follows = total_steps is None
        super().__init__(optimizer, self._factor)

    def plan(self, total_steps: int) -> None:
        """Set the number of all optimizer steps; the rate is then the one that this plan has at the present step."""
        if total_steps != self.total_steps:
            self.total_steps = total_steps
            self._set_rates()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was saved, on the plan of this run: it may have more steps than the earlier one."""
        super().load_state_dict({**state_dict, "total_steps": self.total_steps, "follows": self.follows})
        follow(self)
        self._set_rates()

    def _set_rates(self) -> None:
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self._factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _factor(self, step: int) -> float:
        total = self.total_steps or 1
        rising = round(self.warmup * total)
        if step < rising:
            return (step + 1) / rising
        return max(0.0, (total - step) / max(1, total - rising))


def steps_of(scheduler: Any) -> int | None:
    """The number of all optimizer steps by which a schedule plans; None for one that plans by none."""
    steps: int | None = scheduler.total_steps if isinstance(scheduler, LinearWarmup | OneCycleLR) else None
    return steps
