"""Lightning's callbacks that cannot do here what they are for, each with its reason."""

from collections.abc import Iterable

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, BasePredictionWriter, Checkpoint, ModelPruning, ProgressBar

from peftlight.errors import UserError

_BASES: dict[type[Callback], str] = {
    Callback: "of all callbacks",
    BaseFinetuning: "of callbacks that unfreeze layers",
    BasePredictionWriter: "of callbacks that write predictions; those go to predictions.jsonl of the run",
    Checkpoint: "of callbacks that write checkpoints, such as ModelCheckpoint",
    ProgressBar: "of bars, such as RichProgressBar",
}
"""Classes that do nothing by themselves."""


def refuse_callbacks(callbacks: Iterable[Callback]) -> None:
    """See that each callback can do what it is for.

    Raises:
        UserError: one cannot.
    """
    for callback in callbacks:
        if (of := _BASES.get(type(callback))) is not None:
            raise UserError(
                f"{type(callback).__name__} is the base class {of}, and does nothing by itself: name a class that is "
                "derived from it, or leave it out of trainer.callbacks."
            )
        if isinstance(callback, ModelPruning):
            raise UserError(
                "ModelPruning sets weights of the base to zero and gives its parameters other names, and the base has "
                "to stay as it is for the adapter to fit it. Prune the model before, and train on the result; to have "
                "the adapter lose ranks that it does not need: --model.strategy AdaLoRA"
            )
