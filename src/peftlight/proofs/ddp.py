"""The proof that several processes train what one does on the same rows."""

from typing import Any

from safetensors.torch import load_file

from peftlight.errors import UserError
from peftlight.proofs.agreement import Leaves, Outcome, count, first_gap, largest_gap
from peftlight.proofs.trainings import Bench, Trained
from peftlight.proofs.witness import gradient_file

_NEAR_GRADIENT = 1e-6
"""How far gradients may be apart, as a share of the largest of all."""
_NEAR_WEIGHT = 1e-5
"""How far what was trained may be apart in the end."""


def prove_ddp(bench: Bench, steps: int, processes: int, strategy: str) -> Outcome:
    """Train on several processes of this machine's CPU, and on one with as many times the rows in a batch.

    Compared are the gradients of the first step and what is trained in the end. Dropout is off, since no two processes
    draw the same numbers as one; numbers have 64 bits, so that rounding neither hides nor feigns a difference.

    Raises:
        UserError: the data has no `batch_size`, or the configuration is not right.
    """
    if processes < 2:
        raise UserError(f"--devices is {processes}: there have to be at least 2 processes to be compared with one.")
    small: dict[str, Any] = {"trainer.accelerator": "cpu", "trainer.precision": "64-true", "model.dtype": "float32"}
    together = {**small, "trainer.devices": processes, "trainer.strategy": strategy}
    many = bench.train(f"{processes} processes, {strategy}", steps, together, dropout=False)
    rows = _batch_size(many) * processes
    alone = {**small, "trainer.devices": 1, "trainer.strategy": "auto", "data.batch_size": rows}
    one = bench.train("1 process", steps, alone, dropout=False)
    return _of_gradients(one, many, processes) or _of_ends(one, many, processes)


def _of_gradients(one: Trained, many: Trained, processes: int) -> Outcome | None:
    """What differs in the first step's gradients, on any process; None where nothing does."""
    alone = _gradients(one, 0)
    for process in range(processes):
        gap = first_gap(alone, _gradients(many, process), limit=_NEAR_GRADIENT * _scale(alone))
        if gap is not None:
            return Outcome(False, f"the gradient of {gap.told('on one', f'on process {process + 1} of {processes}')}")
    return None


def _of_ends(one: Trained, many: Trained, processes: int) -> Outcome:
    """What differs in what was trained in the end; how near all was, where nothing does."""
    end: Leaves = one.checkpoint()["state_dict"]
    other_end: Leaves = many.checkpoint()["state_dict"]
    gap = first_gap(end, other_end, limit=_NEAR_WEIGHT)
    if gap is not None:
        return Outcome(False, f"after the last step {gap.told('on one', f'on {processes} processes')}")
    alone, together = _gradients(one, 0), _gradients(many, 0)
    apart, apart_in_the_end = largest_gap(alone, together) / _scale(alone), largest_gap(end, other_end)
    return Outcome(
        True,
        f"the gradients of the first step, {count(alone)}, within {apart:.1e} of the largest (allowed: "
        f"{_NEAR_GRADIENT:g}); what is trained, within {apart_in_the_end:.1e} in the end (allowed: {_NEAR_WEIGHT:g}); "
        "in float64, dropout off",
    )


def _gradients(trained: Trained, process: int) -> Leaves:
    return dict(load_file(gradient_file(trained.kept, process)))


def _scale(gradients: Leaves) -> float:
    """The largest number of all, without its sign."""
    return max((float(gradient.abs().max()) for gradient in gradients.values()), default=0.0) or 1.0


def _batch_size(trained: Trained) -> int:
    options = trained.config()["data"]["init_args"]
    if "batch_size" not in options:
        raise UserError("The data has no option batch_size, so one process cannot be given the rows of several.")
    return int(options["batch_size"])
