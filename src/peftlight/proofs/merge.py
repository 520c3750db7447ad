"""The proof that a merged model computes what base and adapter do."""

from peftlight.console import say
from peftlight.merged import merged
from peftlight.merging.folding import NotTheSame
from peftlight.merging.table import table_of
from peftlight.opening import Opening
from peftlight.proofs.agreement import Outcome
from peftlight.proofs.trainings import Bench


def prove_merge(bench: Bench, steps: int) -> Outcome:
    """Train, merge what was trained, and compare what both compute.

    Raises:
        UserError: the configuration is not right, or its adapter cannot be merged.
    """
    trained = bench.train("trained", steps, {"trainer.devices": 1, "trainer.strategy": "auto"})
    opening = Opening(trust_remote_code=trained.trusts_code())
    try:
        certificate, _ = merged(str(trained.run), str(bench.folder / "merged"), opening)
    except NotTheSame as error:
        return Outcome(False, str(error))
    say(table_of(certificate))
    far = f"{certificate.difference.relative:.1e} of the largest score"
    return Outcome(True, f"the merged model is within {far} of base and adapter (allowed: {certificate.tolerance:g})")
