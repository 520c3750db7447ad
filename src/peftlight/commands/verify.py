"""`peftlight verify`: proofs on the user's own configuration at small size."""

from typing import TYPE_CHECKING, Literal

from peftlight.commands.call import FitOptions

if TYPE_CHECKING:
    from pathlib import Path


def verify(
    what: Literal["resume", "ddp", "parity", "merge"],
    options: FitOptions,
    steps: int = 6,
    devices: int = 2,
    strategy: Literal["ddp", "fsdp2"] = "ddp",
    keep: str | None = None,
) -> int:
    """Prove on a configuration (--config FILE and --KEY VALUE, as for fit) that something changes no number.

    A few steps are trained in processes of their own, on a few of the configuration's rows, in a temporary folder.
    The exit code is 0 where the proof holds, 1 where it does not.

    Args:
        what: resume: a training killed twice and resumed is the one left alone, bit for bit. ddp: several processes
            train what one does. parity: what was trained is what was saved, and what transformers reads. merge: the
            merged model computes what base and adapter do.
        options: those of fit.
        steps: optimizer steps of each training.
        devices: processes that ddp compares with one.
        strategy: how these share the work.
        keep: a new folder for all that the trainings write; none: it is removed.
    """
    import tempfile
    from collections.abc import Callable
    from pathlib import Path

    from peftlight.console import say
    from peftlight.errors import UserError
    from peftlight.proofs.agreement import Outcome
    from peftlight.proofs.ddp import prove_ddp
    from peftlight.proofs.merge import prove_merge
    from peftlight.proofs.parity import prove_parity
    from peftlight.proofs.resume import prove_resume
    from peftlight.proofs.trainings import Bench

    if steps < 1:
        raise UserError(f"--steps is a number of optimizer steps, at least 1; it is {steps}.")
    proofs: dict[str, Callable[[Bench], Outcome]] = {
        "resume": lambda bench: prove_resume(bench, steps),
        "ddp": lambda bench: prove_ddp(bench, steps, devices, strategy),
        "parity": lambda bench: prove_parity(bench, steps),
        "merge": lambda bench: prove_merge(bench, steps),
    }
    with tempfile.TemporaryDirectory(prefix="peftlight-verify-") as folder:
        outcome = proofs[what](Bench(options, _made(keep) if keep else Path(folder)))
    say(f"{'equal' if outcome.holds else 'differs'}: {outcome.text}")
    return 0 if outcome.holds else 1


def _made(folder: str) -> "Path":
    from pathlib import Path

    from peftlight.errors import UserError

    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--keep {folder} is there already; expected the name of a new folder.")
    path.mkdir(parents=True, exist_ok=True)
    return path
