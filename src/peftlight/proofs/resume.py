"""The proof that a training which was killed and resumed is the one that was left alone."""

import csv
from collections.abc import Iterator

from peftlight.errors import UserError
from peftlight.proofs.agreement import Leaves, Outcome, count, first_gap, leaves
from peftlight.proofs.trainings import Bench, Trained

_STATE = ("epoch", "global_step", "state_dict", "optimizer_states", "lr_schedulers", "random_states", "MixedPrecision")
"""What of a checkpoint has to be the same; the rest names files, times and machines."""
_OF_TIME = ("tokens_per_second",)
_LEAST = 3


def prove_resume(bench: Bench, steps: int) -> Outcome:
    """Train once straight, once killed twice by SIGKILL and resumed each time, in the middle of an epoch and after it.

    Compared are, bit for bit, the loss and the batches of each step, all that is trained, the optimizer's and the
    schedule's state, the random numbers' state at the end, and all logged metrics.

    Raises:
        UserError: there are too few steps, or the configuration is not right.
    """
    if steps < _LEAST:
        raise UserError(f"--steps is {steps}: resuming is proven within an epoch and after one, in at least {_LEAST}.")
    straight = bench.train("straight", steps)
    resumed = bench.train("killed", steps, kill=True)
    told, told_again = _told(straight), _told(resumed)
    state, state_again = _state(straight), _state(resumed)
    gaps = [gap for gap in (first_gap(told, told_again), first_gap(state, state_again)) if gap is not None]
    if gaps:
        return Outcome(False, "\n  ".join(gap.told("straight", "resumed") for gap in gaps))
    return Outcome(True, f"bit for bit {count(state)} (what is trained, the optimizer's state, the random numbers'), "
                         f"and {len(told):,} losses, batches and logged values")  # fmt: skip


def _told(trained: Trained) -> Leaves:
    """What a training said of its steps."""
    return {**leaves(trained.first_steps()), **dict(_logged(trained))}


def _state(trained: Trained) -> Leaves:
    """What a training had in the end."""
    checkpoint = trained.checkpoint()
    return leaves({name: checkpoint[name] for name in _STATE if name in checkpoint})


def _logged(trained: Trained) -> Iterator[tuple[str, str]]:
    """What metrics.csv holds, by step and name."""
    with open(trained.run / "metrics.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row.pop("step")
            for name, value in row.items():
                if value and name not in _OF_TIME:
                    yield f"metrics.csv, step {step}, {name}", value
