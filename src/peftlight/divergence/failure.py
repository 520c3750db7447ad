"""The message of a failed step, for which the failure is looked into on all processes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.divergence.cause import Circumstances, cause
from peftlight.divergence.evidence import Evidence, examine
from peftlight.divergence.failed_batch import store
from peftlight.divergence.micro_batch import MicroBatch
from peftlight.divergence.step import Failure, Step
from peftlight.errors import UserError
from peftlight.finite import largest, not_finite
from peftlight.gather import gathered

_SAID: dict[Failure, str] = {
    "loss": "the loss is not finite ({loss})",
    "gradient": "the gradient is not finite, though the loss is ({loss:.4g})",
    "skipped": "the gradient has not been finite for many steps, whatever its scale",
    "penalty": "the gradient of the strategy's penalty is not finite",
    "no labels": "no row of the last steps had a label",
    "no loss": "the loss has been exactly 0 for many steps",
    "no gradient": "the gradient has been exactly 0 in all trained tensors for many steps, at a loss of {loss:.4g}",
}


def failure(task: Any, window: Sequence[MicroBatch], found: Failure, steps: Sequence[Step]) -> str:
    """Look into the step that failed, store its batch, and say all of it. All processes have to call it.

    Args:
        task: see `Task` in `peftlight.divergence.evidence`.
        window: the step's micro-batches on this process.
        found: what is wrong.
        steps: the last ones, the failed one at the end.
    """
    step = steps[-1]
    of_batch, of_gradient = found != "penalty", found in ("gradient", "skipped")
    own, micro = examine(task, window, of_gradient)
    every = gathered(own)
    chosen = min(every, key=lambda evidence: (not evidence.guilty, evidence.process))
    stored = _stored(task, micro, chosen, step, found) if of_batch and chosen.process == own.process else ""
    lines = [
        f"Training was stopped before step {step.number}: {_SAID[found].format(loss=step.loss)}. "
        f"The weights are those after step {step.number - 1}.",
        *(chosen.lines() if of_batch else []),
        *(f"Process {other.process}, micro-batch {other.number}: the same." for other in every
          if other.guilty and other is not chosen),
        _bad_gradients(task.model) if of_gradient else "",
        _course(steps),
        f"Likely cause: {cause(_circumstances(task, found, steps, chosen))}",
        "".join(gathered(stored)),
    ]  # fmt: skip
    return "\n".join(line for line in lines if line)


def _bad_gradients(model: nn.Module) -> str:
    """In which tensors the step's gradient is not finite."""
    trained = _named(model, True)
    bad = _not_finite_anywhere({name: p.grad for name, p in trained.items()})
    return f"The gradient is not finite in {len(bad)} of {len(trained)} trained tensors" + (
        f"; the one nearest to the loss is {bad[-1]}." if bad else "."
    )


def _stored(task: Any, micro: MicroBatch, evidence: Evidence, step: Step, found: Failure) -> str:
    facts = {
        "failure": found, "step": step.number, "micro_batch": evidence.number, "process": evidence.process,
        "loss": evidence.loss, "rows": evidence.rows,
    }  # fmt: skip
    try:
        path = store(Path(task.trainer.default_root_dir), micro, facts)
    except UserError as error:
        return f"The batch could not be stored: {error}"
    return f"The batch is kept in {path}; safetensors.torch.load_file reads it."


def _course(steps: Sequence[Step]) -> str:
    losses, gradients = (", ".join(f"{value:.2g}" for value in values)
                         for values in ([s.loss for s in steps], [s.gradient for s in steps]))  # fmt: skip
    return f"Last steps: losses {losses}; largest gradients {gradients}; learning rate {steps[-1].rate:.3g}."


def _circumstances(task: Any, found: Failure, steps: Sequence[Step], evidence: Evidence) -> Circumstances:
    trainer, model = task.trainer, task.model
    trained, frozen = (_named(model, trains) for trains in (True, False))
    weight = float(largest((p.detach() for p in trained.values()), task.device))
    return Circumstances(
        found,
        steps,
        inputs=evidence.inputs,
        base=_not_finite_anywhere(frozen),
        trained=_not_finite_anywhere(trained),
        weight=max(gathered(weight)),
        half=trainer.precision.startswith("16") or getattr(task, "dtype_of_base", None) == "float16",
        trained_in_half=any(p.dtype == torch.float16 for p in trained.values()),
        quantized=getattr(task, "quantization", None) is not None,
        clipped=bool(trainer.gradient_clip_val),
    )


def _named(model: nn.Module, trains: bool) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad == trains}


def _not_finite_anywhere(tensors: Mapping[str, Tensor | None]) -> list[str]:
    """Names of those that are not finite in any process, which may hold a part only."""
    own = not_finite((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    found = {name for names in gathered(own) for name in names}
    return [name for name in tensors if name in found]
