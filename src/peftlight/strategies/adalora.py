"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning.

Qingru Zhang, Minshuo Chen, Alexander Bukharin, Nikos Karampatziakis, Pengcheng He, Yu Cheng, Weizhu Chen, Tuo Zhao,
2023, https://arxiv.org/abs/2303.10512
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from peftlight.delta import Delta
from peftlight.errors import UserError, listed
from peftlight.linear import widths
from peftlight.strategies.adalora_layers import (
    PrunedSVDLinear,
    SVDLinear,
    allocate,
    distances,
    drawn,
    updates,
    weigh,
    whole,
)
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.targets import chosen


@dataclass
class AdaLoRA(PEFTStrategy):
    """Train low-rank updates in the form of an SVD, and give rank to the layers where it matters most.

    Every layer starts with rank `init_r`. A budget of singular values over all layers then falls along a cubic curve
    to `target_r` for each layer on average, and the least important ones are set to zero.
    """

    init_r: int = 12
    """Rank of every layer's update at the start."""
    target_r: int = 8
    """Average rank at the end: the final budget is this times the number of layers, and is met exactly."""
    alpha: float = 16
    """Numerator of the scale alpha / init_r, which stays when ranks fall."""
    dropout: float = 0.0
    """Dropout on the input of the update."""
    target_modules: str | list[str] | None = None
    """Names of layers, a preset (attention, attention+mlp, all-linear) or a regex; none: the architecture's default."""
    exclude_modules: list[str] | None = None
    """Names of layers to leave alone."""
    layers: str | list[int] | None = None
    """Which blocks of the stack: "last 4", "first 2", "0-3", or a list of numbers; none: all."""
    initial_phase: int | float = 0.1
    """How long all ranks stay at init_r: optimizer steps as a whole number, or a share of all steps below 1."""
    final_phase: int | float = 0.4
    """How long the end is trained with the final ranks: optimizer steps, or a share of all steps below 1."""
    interval: int = 1
    """Optimizer steps between two allocations of the budget."""
    beta1: float = 0.85
    """Decay of the moving average of the sensitivity."""
    beta2: float = 0.85
    """Decay of the moving average of the sensitivity's uncertainty."""
    orthogonality: float = 0.5
    """Weight of the penalty that keeps the singular vectors orthonormal."""
    orthogonality_form: Literal["norm", "squared"] = "norm"
    """The penalty: the mean of the matrices' norms, as HF PEFT has it, or the sum of their squares, as in the paper."""
    final_ranks: dict[str, int] = field(default_factory=dict)
    """Ranks that an earlier training found, by the layer's path; empty: find them. Loading an adapter sets them."""

    def __post_init__(self) -> None:
        if self.target_r < 1:
            raise UserError(
                f"AdaLoRA's budget is at least one singular value for each layer; target_r is {self.target_r}."
            )
        if self.init_r <= self.target_r and not self.final_ranks:
            raise UserError(
                f"AdaLoRA takes rank away, so init_r must be above target_r: they are {self.init_r} and "
                f"{self.target_r}. Set init_r to {self.target_r + 1} or more (half as much again is usual)"
                + (f", or target_r to {self.init_r - 1} or less." if self.init_r > 1 else ".")
            )
        if self.alpha <= 0:
            raise UserError(f"AdaLoRA's alpha is a number above 0, or the update would be nothing; got {self.alpha}.")
        if self.interval < 1:
            raise UserError(f"AdaLoRA's interval is at least 1 step; got {self.interval}.")
        for name, value in (("initial_phase", self.initial_phase), ("final_phase", self.final_phase)):
            if value < 0 or (isinstance(value, float) and value >= 1):
                raise UserError(f"AdaLoRA's {name} is a whole number of steps, or a share from 0 to 1; got {value}.")
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < value < 1:
                raise UserError(f"AdaLoRA's {name} lies between 0 and 1; got {value}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"AdaLoRA's dropout is a share from 0 up to, not including, 1; got {self.dropout}.")
        if self.orthogonality < 0:
            raise UserError(f"AdaLoRA's orthogonality is a weight of at least 0; got {self.orthogonality}.")

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        sites = chosen(
            model, self.target_modules, (nn.Linear,), exclude_modules=self.exclude_modules, layers=self.layers,
            method=type(self).__name__,
        )  # fmt: skip
        sizes = {name: widths(module) for name, module in sites.items()}
        self._check_ranks(sizes)
        scale = self.alpha / (self.init_r + 1e-5)  # HF PEFT guards the division, and so the last digits are its own
        for name, (inputs, outputs) in sizes.items():
            factors = drawn(inputs, outputs, self.final_ranks.get(name, self.init_r))
            yield name, (SVDLinear if self.final_ranks else PrunedSVDLinear)(*factors, scale, self.dropout)

    def penalty(self, adapter: Adapter) -> Tensor | None:
        """The weighted distance of P and Q from orthonormal (equation 4)."""
        if not self.orthogonality:
            return None
        norms = distances([whole(m) for delta in updates(adapter).values() for m in (delta.A, delta.B.mT)])
        return self.orthogonality * (norms.mean() if self.orthogonality_form == "norm" else norms.square().sum())

    def check_steps(self, last_step: int) -> None:
        initial, settled = self.phases(last_step)
        if self.final_ranks or settled > max(1, initial):
            return
        if last_step < 2:
            raise UserError("AdaLoRA needs at least 2 steps, one to weigh the singular values and one to choose.")
        final = last_step - settled
        raise UserError(
            f"AdaLoRA has no step left in which to lower the ranks: of {last_step} steps in all, initial_phase "
            f"({self.initial_phase}) takes {initial} and final_phase ({self.final_phase}) takes {final}. They may "
            f"take {last_step - 1} together, and final_phase {last_step - 2}; or train longer."
        )

    def phases(self, last_step: int) -> tuple[int, int]:
        """(the last step before the budget falls, the step at which it has fallen) in a training of `last_step`."""
        initial, final = (
            phase if isinstance(phase, int) else int(phase * last_step)
            for phase in (self.initial_phase, self.final_phase)
        )
        return initial, last_step - final

    def budget(self, step: int, last_step: int, layers: int) -> int:
        """Singular values left in all layers together after a step (section 3.3)."""
        initial, settled = self.phases(last_step)
        most, least = self.init_r * layers, self.target_r * layers
        if step >= settled:
            return least
        left = min(1.0, 1 - (step - initial) / (settled - initial))
        return int((most - least) * left**3 + least)

    def after_step(self, adapter: Adapter, step: int, last_step: int) -> None:
        """Weigh the singular values, and take away those beyond the budget of this step.

        From the step on at which the final budget is reached nothing is weighed, so that each allocation gives the
        same ranks, and takes back what the optimizer added to the values that are gone.
        """
        deltas = [delta for delta in adapter.sites.values() if isinstance(delta, PrunedSVDLinear)]
        initial, settled = self.phases(last_step)
        if not deltas:
            return
        if step < settled:
            weigh(deltas, self.beta1, self.beta2)
        if step >= settled or (step > initial and step % self.interval == 0):
            allocate(deltas, self.budget(step, last_step, len(deltas)))
            for delta in deltas:
                delta.settled.fill_(step >= settled)

    def unmet(self, adapter: Adapter, step: int, last_step: int) -> str | None:
        """Ranks are not cut afterwards: the model without them would be one that nothing trained or measured."""
        _, settled = self.phases(last_step)
        ranks = self.finished(adapter).final_ranks
        budget, left = self.target_r * len(ranks), sum(ranks.values())
        if self.final_ranks or left <= budget:
            return None
        return (
            f"AdaLoRA's budget is not met: {left} singular values are left of {self.init_r * len(ranks)}, and target_r "
            f"{self.target_r} over {len(ranks)} layers allows {budget}. The training ended after step {step} of "
            f"{last_step}, and the budget was to be met at step {settled}. The adapter has the {left}. To meet the "
            f"budget, train for {settled} steps of this plan, or plan for fewer (trainer.max_steps, max_epochs)."
        )

    def figures(self, adapter: Adapter) -> Mapping[str, float]:
        """The rank of every layer's update, and of all together."""
        deltas = updates(adapter)
        ranks = torch.stack([delta.rank() for delta in deltas.values()]).tolist()
        return {"rank/total": sum(ranks), **{f"rank/{site}": rank for site, rank in zip(deltas, ranks, strict=True)}}

    def finished(self, adapter: Adapter) -> "AdaLoRA":
        """The recipe with the ranks that are left.

        Raises:
            UserError: the training is over, and what is left is not the budget.
        """
        ranks = {site: len(delta.finished().A) for site, delta in updates(adapter).items()}
        over = all(isinstance(d, PrunedSVDLinear) and bool(d.settled) for d in updates(adapter).values())
        budget, left = self.target_r * len(ranks), sum(ranks.values())
        if over and left != budget:
            raise UserError(
                f"AdaLoRA's training is over with {left} singular values, but target_r {self.target_r} over "
                f"{len(ranks)} layers allows {budget}: something changed the adapter {adapter.name!r} since its last "
                "step. It is not saved."
            )
        return replace(self, final_ranks=ranks)

    def _check_ranks(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        if self.final_ranks:
            if wrong := self.final_ranks.keys() ^ sizes.keys():
                raise UserError(
                    f"AdaLoRA's final_ranks has one rank for each selected layer; {listed(sorted(wrong))} "
                    "are only in one of the two. Leave final_ranks out to find ranks anew."
                )
            return
        name, most = min(((name, min(size)) for name, size in sizes.items()), key=lambda pair: pair[1])
        if self.init_r > most:
            raise UserError(
                f"AdaLoRA's init_r is {self.init_r}, but {name} is {sizes[name][0]} wide inside and {sizes[name][1]} "
                f"outside, so it has no more than {most} singular values. Set init_r to {most} or less, or leave the "
                "layer out (target_modules, exclude_modules)."
            )
