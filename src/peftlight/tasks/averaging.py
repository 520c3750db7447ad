"""The mean gradient over all processes, for parameters that each of them holds whole."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every parameter the mean of its gradients over the processes, in one message.

    A process whose loss did not reach a parameter counts as zero; where none did, there is still no gradient.
    """
    if not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    reached = torch.tensor([p.grad is not None for p in parameters]).to(gradients[0])
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), reached])
    dist.all_reduce(flat)
    *means, reached = (flat / dist.get_world_size()).split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, mean, anywhere in zip(parameters, means, reached, strict=True):
        if parameter.grad is not None or anywhere:
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)
