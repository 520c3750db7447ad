"""From the losses of micro-batches to the gradient that the optimizer steps with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftlight.errors import UserError, listed
from peftlight.finite import largest, not_finite
from peftlight.liveness import Liveness, Verdict
from peftlight.strategy import Adapter
from peftlight.tasks.label_window import Closed, LabelWindow

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


class OptimizerStep:
    """Makes the gradient of each optimizer step, over all its labels, with the penalty; has it judged and logged."""

    def __init__(self, module: "PEFTModule") -> None:
        self._module = module
        self._liveness: Liveness | None = None
        self._steps, self._highest = 0, 0.0
        self.window = LabelWindow(self._summed)

    def start(self, adapter: Adapter) -> None:
        """Begin a training of the adapter: nothing is left of one before.

        Raises:
            UserError: what is to be trained is not finite.
        """
        if bad := not_finite(adapter.state().items()):
            raise UserError(
                f"{len(bad)} of the tensors to be trained hold values that are not finite (NaN or infinite): "
                f"{listed(bad)}. The base's file is damaged there, or was converted to a number format too small for "
                "it: load another copy. Or the strategy starts them so."
            )
        self.window.start()
        self._steps, self._highest = 0, 0.0
        self._liveness = Liveness(adapter)

    def add(self, loss_sum: Tensor, labels: Tensor) -> Tensor:
        """Take one micro-batch in; returns what Lightning is to differentiate."""
        trainer = self._module.trainer
        # The trainer divides by the first factor, the processes average over the second.
        return self.window.add(loss_sum, labels) * trainer.accumulate_grad_batches * trainer.world_size

    def before_backward(self, loss: Tensor) -> None:
        """See that the loss is one to learn from, and that no process would wait for gradients that another lacks.

        Raises:
            UserError: it is not, or one would.
        """
        assert self._liveness is not None
        trainer, name = self._module.trainer, type(self._module).__name__
        if not self.window.is_open:
            raise UserError(
                f"{name}.training_step differentiates a loss of its own, which is not divided by the labels of the "
                "global batch. Leave training_step as it is, and define `loss`, which returns the summed loss and the "
                "number of labels."
            )
        if not loss.requires_grad:
            raise UserError(
                f"The loss does not depend on anything that trains, so no step would change it: {name}.loss lets go "
                "of it (detach, no_grad, argmax, item)."
            )
        # Private, but Lightning keeps the options of DDP nowhere else.
        ddp = getattr(trainer.strategy, "_ddp_kwargs", None)
        if trainer.world_size > 1 and not (ddp or {}).get("find_unused_parameters"):
            self._liveness.before_backward(loss, self._summed, trainer.world_size, waits=ddp is not None)

    def finish(self, adapter: Adapter, optimizer: Optimizer) -> None:
        """Scale the gradients, have the guard judge them, and add the penalty's.

        Raises:
            UserError: the step may not be taken, or a trained tensor has no gradient.
        """
        module = self._module
        module.unfreezing.check_held(optimizer)
        module.unfreezing.share_gradients()
        parameters = [p for p in module.parameters() if p.requires_grad]
        # Apart from the task's backward: the penalty must not be scaled by the labels, nor summed over processes.
        penalty = module.strategy.penalty(adapter)
        added = [] if penalty is None else torch.autograd.grad(penalty, parameters, allow_unused=True)
        closed = self._closed(parameters, added)
        assert self._liveness is not None
        self._liveness.after_backward()  # the loss alone has to reach every tensor
        gradient, of_penalty = closed.beside
        rates = [float(group["lr"] or 0.0) for group in optimizer.param_groups]  # None: the optimizer finds its own
        rate = rates[0]
        self._steps += 1
        self._highest = max(self._highest, *rates)
        if not module.search.on:  # which tries rates that are too high
            module.guard.judge(module, rate, closed.loss, closed.labels, gradient * closed.factor, of_penalty)
        if penalty is not None:
            _add(parameters, added)
            module.log("train_penalty", penalty.detach())
        module.log("train_loss", closed.loss, prog_bar=True)
        module.log("lr", rate, prog_bar=True)

    def look_again(self) -> None:
        """What requires a gradient is not what it was in the last step."""
        if self._liveness is not None:
            self._liveness.look_again()

    def verdict(self) -> Verdict:
        """What the training did to each trained tensor and to the frozen base.

        Raises:
            UserError: a frozen tensor of the base has changed, or no trained one has.
        """
        assert self._liveness is not None
        verdict = self._liveness.verdict()
        in_earnest = self._steps > 0 and not getattr(self._module.trainer, "fast_dev_run", 0)
        if in_earnest and len(verdict.still) == len(verdict.trained):
            raise UserError(
                f"Nothing was trained: after {self._steps} optimizer steps all {len(verdict.trained)} trained tensors "
                f"are where they started. {self._why_still()} The adapter is not saved."
            )
        return verdict

    def _why_still(self) -> str:
        trainer = self._module.trainer
        if self._highest == 0:
            group = trainer.optimizers[0].param_groups[0]
            schedules = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
            if group.get("initial_lr", group["lr"]) == 0 or not schedules:
                return "The learning rate is 0: set --optimizer.lr above it."
            return (
                f"The learning rate was 0 in every step, by {schedules[0]}: change its settings (--lr_scheduler), or "
                "choose another, such as --lr_scheduler LinearWarmup."
            )
        return (
            f"The learning rate was {self._highest:.3g} at most: too low to change a value in its number format, or "
            f"{type(trainer.optimizers[0]).__name__} does nothing here. Raise --optimizer.lr, or choose another "
            "--optimizer."
        )

    def _closed(self, parameters: Sequence[nn.Parameter], added: Sequence[Tensor | None]) -> Closed:
        """The window at its end; beside it the largest values in the gradients of the loss and of the penalty."""
        both = ([p.grad for p in parameters], added)
        peaks = [largest((g for g in gradients if g is not None), self._module.device) for gradients in both]
        return self.window.close(parameters, torch.stack(peaks) / self._module.trainer.world_size)

    def _summed(self, value: Tensor) -> Tensor:
        """The sum of a value over all processes."""
        total: Tensor = self._module.trainer.strategy.reduce(value, reduce_op="sum")
        return total


def _add(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
