"""Whether an optimizer can step at all, tried before the training."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peftlight.errors import UserError


def refuse_unable(make: Callable[[Any], Optimizer], groups: list[dict[str, Any]]) -> None:
    """Take a step on small stand-ins of the parameters: one for each number of dimensions, format and device.

    Some optimizers take sparse gradients alone, want an option for which they have no default, or do not work on a
    device, and say so in the first step, or not at all.

    Raises:
        UserError: the optimizer was made, and cannot step.
    """
    kinds = {(p.dim(), p.dtype, p.device) for group in groups for p in group["params"]}
    stands = [nn.Parameter(torch.ones([2] * dims, dtype=dtype, device=device)) for dims, dtype, device in
              sorted(kinds, key=str)]  # fmt: skip
    optimizer = make(stands)

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        total = torch.stack([parameter.float().square().sum().cpu() for parameter in stands]).sum()
        total.backward()
        return total

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first step of the training says it too
            optimizer.step(loss)  # type: ignore[arg-type]  # torch's own hint says float, and its text a tensor
    except Exception as error:  # it is anyone's code
        raise UserError(
            f"{type(optimizer).__name__} cannot take a step with these settings and parameters: {error}. Choose "
            "another --optimizer, or change its settings."
        ) from error
