"""From what is known of a failed step to what probably caused it, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from peftlight.divergence.step import Failure, Step
from peftlight.errors import listed

_GROWN = 10
"""Times the median of the steps before: a training about to run away."""
_HUGE = 1e4
"""No trained weight is as large as this, unless a step made it so."""
_CALM = "lower the learning rate (--optimizer.lr), let it rise longer (--lr_scheduler.warmup)"


@dataclass(frozen=True)
class Circumstances:
    """In which a step failed."""

    failure: Failure
    steps: Sequence[Step]
    """The last ones, the failed one at the end."""
    inputs: Sequence[str]
    """What of the batch is not finite."""
    base: Sequence[str]
    """Tensors of the frozen base that are not finite."""
    trained: Sequence[str]
    """Trained tensors that are not finite."""
    weight: float
    """The largest absolute value in what is trained."""
    half: bool
    """Whether numbers are computed in float16."""
    trained_in_half: bool
    """Whether what is trained is held in float16 too."""
    quantized: bool
    """Whether the base is held in 4 or 8 bits."""
    clipped: bool
    """Whether gradients are clipped."""


def cause(of: Circumstances) -> str:
    """The likely cause of a step's failure and the way out, in one or two sentences."""
    if of.failure in ("no labels", "no loss", "no gradient"):
        return _of_nothing(of)
    rate = of.steps[-1].rate
    if of.inputs:
        return f"The batch itself is not finite in {listed(of.inputs)}: look at these rows."
    if of.base:
        return (
            f"The base itself is not finite in {listed(of.base, 3)}: its file is damaged, or was converted to a number "
            "format too small for it. Load another copy, or --model.dtype float32."
        )
    if of.trained and not of.trained_in_half:
        return (
            f"The weights being trained are not finite in {listed(of.trained, 3)} before this step: an earlier step "
            f"was too large for them; {_calmer(of)}. The learning rate is {rate:.3g}."
        )
    if of.half:
        return (
            "float16 holds nothing above 65504, nor Adam's eps of 1e-8, and a model trained in bfloat16 may need more: "
            "set --trainer.precision bf16-mixed, or 32-true, with --model.dtype bfloat16 or float32."
        )
    if of.failure == "penalty":
        return f"The strategy's penalty left the range of numbers; {_calmer(of)}, or lower the penalty's weight."
    if of.weight > _HUGE or _has_grown(of.steps):
        grown = f"trained weights are as large as {of.weight:.2g}" if of.weight > _HUGE else "see the last steps"
        return f"The training was running away ({grown}); {_calmer(of)}. The learning rate is {rate:.3g}."
    if of.failure == "loss":
        return (
            "Nothing ran away before, so it is this batch on this base: look at its rows, and whether the base's file "
            f"is whole and --model.dtype wide enough for it; or else {_calmer(of)}."
        )
    hidden = "Numbers of the base that are not finite, which its few bits hide: is its file whole? Or a" * of.quantized
    return (
        f"{hidden or 'A'} function whose slope is infinite where it was used (a square root or a norm at 0, a division "
        f"by almost 0), in the strategy or in the model; or else {_calmer(of)}."
    )


def _calmer(of: Circumstances) -> str:
    return _CALM + ("" if of.clipped else ", and cut gradients off (--trainer.gradient_clip_val 1.0)")


def _has_grown(steps: Sequence[Step]) -> bool:
    """Whether the last step that was taken stands out from those before it."""
    *earlier, last = steps[:-1] or [steps[-1]]
    return any(
        getattr(last, what) > _GROWN * median(getattr(step, what) for step in earlier)
        for what in ("loss", "gradient")
        if earlier
    )


def _of_nothing(of: Circumstances) -> str:
    if of.failure == "no labels":
        return (
            "The answers are missing from the data, or were cut off behind long prompts: see how many rows the start "
            "of the run counts as cut, and set --data.max_length higher."
        )
    if of.failure == "no gradient":
        return (
            "The loss does not depend on what is trained any more: its units are dead (too high a learning rate does "
            "that), or numbers vanish in the precision; try --trainer.precision 32-true and a lower --optimizer.lr."
        )
    coarse = "the base without quantization and " if of.quantized else ""
    return (
        "A loss of exactly 0 that did not fall there little by little is no success: the scores are the same wherever "
        f"it is computed (a collapse in few bits), or contain the labels. Try {coarse}--trainer.precision 32-true."
    )
