"""Matrices to Muon, and the rest to AdamW, as one optimizer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer


class MuonAndAdamW(Optimizer):
    """torch's Muon, which takes matrices alone, on every trained matrix, and torch's AdamW on all else.

    A group of parameters becomes two, that of its matrices first; what the group sets itself (lr, weight_decay) holds
    for both. Muon: Keller Jordan and others, 2024, https://kellerjordan.github.io/posts/muon/
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        adamw_lr: float = 1e-3,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
    ) -> None:
        """
        Args:
            params: what is trained.
            lr: learning rate of the matrices.
            weight_decay: that of the matrices.
            momentum: of the matrices' gradients.
            nesterov: whether it is Nesterov's.
            ns_steps: steps of the Newton-Schulz iteration that makes an update orthogonal.
            adjust_lr_fn: how the rate follows a matrix's shape: original, or match_rms_adamw for AdamW's rates.
            adamw_lr: learning rate of the rest.
            adamw_betas: decays of AdamW's averages.
            adamw_eps: what AdamW adds to the denominator.
            adamw_weight_decay: weight decay of the rest.
        """
        of_matrices = Muon([torch.zeros(1, 1)], lr, weight_decay, momentum, nesterov, ns_steps=ns_steps,
                           adjust_lr_fn=adjust_lr_fn)  # fmt: skip
        of_the_rest = AdamW([torch.zeros(1)], adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        self._parts = {True: of_matrices, False: of_the_rest}
        super().__init__(params, {})
        self._link()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add one group for its matrices and one for the rest, where there are such."""
        given = param_group["params"]
        parameters = [given] if isinstance(given, Tensor) else list(given)
        for matrices, part in self._parts.items():
            own = [parameter for parameter in parameters if (parameter.dim() == 2) == matrices]
            if own:
                super().add_param_group({**part.defaults, **param_group, "params": own, "matrices": matrices})
        self._link()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            if part.param_groups:
                part.step()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._link()

    def _link(self) -> None:
        """Have the two work on this optimizer's own groups and state, so that what schedules and checkpoints change is
        theirs."""
        for matrices, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["matrices"] == matrices]
            part.state = self.state
