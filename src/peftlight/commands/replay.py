"""`peftlight replay`: the first steps of a recorded run, trained again."""


def replay(run: str, steps: int = 20) -> int:
    """Train the first steps of a recorded run again, from its own config.yaml, and say whether they agree.

    The exit code is 0 where losses and batches are those in run.json, or nearly so on another machine; 1 where not.

    Args:
        run: the run's folder.
        steps: how many optimizer steps; a run records 20.
    """
    from pathlib import Path

    from peftlight.console import say
    from peftlight.errors import UserError
    from peftlight.proofs.replay import replay_run

    if steps < 1:
        raise UserError(f"--steps is a number of optimizer steps, at least 1; it is {steps}.")
    outcome = replay_run(Path(run), steps)
    say(f"{'equal' if outcome.holds else 'differs'}: {outcome.text}")
    return 0 if outcome.holds else 1
