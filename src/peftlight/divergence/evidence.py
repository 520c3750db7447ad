"""What each process knows of the micro-batch that made a step fail."""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from peftlight.divergence.first_bad_output import watched
from peftlight.divergence.micro_batch import MicroBatch
from peftlight.finite import not_finite
from peftlight.shards import is_sharded

_ROWS = 8
"""Rows that are written out; a message has to fit on a screen."""


class Task(Protocol):
    """What is needed of a LightningModule to compute a batch once more."""

    model: nn.Module | None

    @property
    def trainer(self) -> Any:
        """Its Trainer."""

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss summed over the batch's labels, number of labels), both scalars."""


@dataclass
class Evidence:
    """Plain values, which travel between processes."""

    process: int
    number: int
    """Of the micro-batch in its step, from 1."""
    of: int
    rows: list[str]
    """One line for each row: its id, its place in the data, its tokens and labels."""
    guilty: bool = False
    """Whether this micro-batch gives what made the step fail."""
    loss: float | None = None
    """The mean per label, computed once more; None where that could not be done."""
    found: str = ""
    """Where the first numbers come from that are not finite."""
    inputs: list[str] = field(default_factory=list)
    """Names of what in the batch itself is not finite."""

    def lines(self) -> list[str]:
        """As a message shows it."""
        loss = "" if self.loss is None else f", loss {self.loss:.4g}"
        left = len(self.rows) - _ROWS
        more = [f"  and {left} rows more"] if left > 0 else []
        head = f"Process {self.process}, micro-batch {self.number} of {self.of}{loss}:"
        return [head, *(f"  {row}" for row in self.rows[:_ROWS]), *more, *([self.found] if self.found else [])]


def examine(task: Task, window: Sequence[MicroBatch], of_gradient: bool) -> tuple[Evidence, MicroBatch]:
    """Compute this process's micro-batches once more, up to the one that made the step fail.

    Args:
        task: whose model and loss they are computed with.
        window: the step's micro-batches on this process, in their order.
        of_gradient: whether their losses are finite, and a gradient is not.
    """
    bad = [place for place, micro in enumerate(window) if micro.loss is not None and not micro.loss.isfinite()]
    every = range(len(window)) if of_gradient and not _is_sharded(task) else [len(window) - 1]
    for place in bad[:1] or every:
        micro = window[place]
        evidence = Evidence(task.trainer.global_rank, place + 1, len(window), described(task, micro))
        _compute(task, micro, evidence, of_gradient)
        if evidence.guilty:
            break
    return evidence, micro


def _compute(task: Task, micro: MicroBatch, evidence: Evidence, of_gradient: bool) -> None:
    assert task.model is not None
    backward = of_gradient and not _is_sharded(task)
    evidence.inputs = not_finite(micro.tensors().items())
    try:
        with watched(task.model) as outputs, micro.as_it_was(task.trainer), torch.set_grad_enabled(backward):
            loss, labels = task.loss(copy(micro.batch))
        evidence.loss = float(loss.detach() / labels.clamp(min=1))
        if not loss.isfinite():
            evidence.guilty, evidence.found = True, str(outputs)
        elif backward:
            _differentiate(task.model, loss, evidence)
        elif micro.loss is not None and not micro.loss.isfinite():
            evidence.found = "Computed once more, its loss is finite."
        elif of_gradient:
            evidence.found = "Which micro-batch it is cannot be told where the model is sharded; this is the last one."
    except Exception as error:  # memory may have run out: the failure that is looked into must be told all the same
        evidence.found = f"It could not be computed once more: {type(error).__name__}: {error}"


def _differentiate(model: nn.Module, loss: Tensor, evidence: Evidence) -> None:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = zip(trained, torch.autograd.grad(loss, list(trained.values()), allow_unused=True), strict=True)
    evidence.guilty = bool(not_finite((name, gradient) for name, gradient in gradients if gradient is not None))
    evidence.found = "" if evidence.guilty else "Computed once more, its gradient is finite."


def described(task: Task, micro: MicroBatch) -> list[str]:
    """One line for each row of a micro-batch."""
    batch, ids = micro.batch, micro.rows()
    count = len(ids)
    tokens = batch["attention_mask"].sum(1).tolist() if "attention_mask" in batch else [None] * count
    labels = (batch["labels"] >= 0).reshape(count, -1).sum(1).tolist() if "labels" in batch else [0] * count
    return [_line(task, *row) for row in zip(ids, tokens, labels, strict=True)]


def _line(task: Task, row: int, tokens: int | None, labels: int) -> str:
    where: Callable[[int], str] | None = getattr(getattr(task.trainer, "datamodule", None), "where", None)
    place = f" ({where(row)})" if where else ""
    length = "" if tokens is None else f"{tokens} tokens, "
    return f"row {row}{place}: {length}{labels} {'label' if labels == 1 else 'labels'}"


def _is_sharded(task: Task) -> bool:
    """Whether every process has to compute with every other: then all compute one micro-batch, forward alone."""
    assert task.model is not None
    return is_sharded(task.model)
