"""The end of a training: what stands after all callbacks is audited, validated, and handed on to be kept."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

from lightning.pytorch import Callback, LightningModule, Trainer

from peftlight.errors import UserError
from peftlight.gather import gathered
from peftlight.liveness import state_checksum
from peftlight.shards import is_sharded
from peftlight.tasks import loop_progress
from peftlight.tasks.early_base import is_ours
from peftlight.tasks.task_callback import TaskCallback

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule

_KEY = "validated"


class Validation(TypedDict):
    """What was measured by a validation that came to its end."""

    state: str
    """The checksum of what trains, as the callbacks had it in the validation."""
    metrics: list[str]
    """Names of what was logged."""


class Ending:
    """Knows which state was validated last, and sees that the one which is kept has been.

    A callback may write weights when the training ends (an average, the best ones), or exchange them for the time of a
    validation, so neither the last step nor the last validation says what the adapter is worth.
    """

    def __init__(self, module: "PEFTModule") -> None:
        self._module = module
        self.last: Validation | None = None
        self.exchanged = False
        """Whether a callback has other weights in the model for the validation under way."""
        self._before: str | None = None
        self._measured: str | None = None
        self._kept: str | None = None

    # ---- validations

    def start(self) -> None:
        """A training begins; what its checkpoint says was validated counts."""
        self._kept, self.exchanged = None, False

    def validation_begins(self) -> None:
        """Note what trains before any callback exchanges it."""
        self._before = self._checksum()

    def forget_measured(self) -> None:
        """A validation begins anew, whatever became of one before."""
        self._measured, self.exchanged = None, False

    def measures(self) -> None:
        """Note what is measured; before the first batch, after all that callbacks do."""
        if self._measured is None:
            self._measured = self._checksum()
            self.exchanged = self._before not in (None, self._measured)

    def validation_ends(self) -> None:
        """Count the validation as done; within an `on_validation_end`."""
        self.exchanged = False
        if self._measured is not None:
            # Private, but Lightning tells nowhere else what this validation alone has logged.
            logged = self._module.trainer._logger_connector.metrics["callback"]
            self.last = Validation(state=self._measured, metrics=sorted(logged))

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint what was validated."""
        checkpoint[_KEY] = self.last

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over what a checkpoint says of it."""
        self.last = checkpoint.get(_KEY)

    def outdated_metrics(self) -> set[str]:
        """Names of the metrics of the last validation, if they are not those of the state at hand."""
        if self.last is None or self.last["state"] == self._checksum():
            return set()
        return set(self.last["metrics"])

    # ---- the end

    def conclude(self) -> None:
        """Audit what stands, validate it if that is still to be done, and hand it on; all processes come here.

        Raises:
            UserError: the audit fails.
        """
        self._module.follow_unfreezing()
        self._agree()
        try:
            self._module.audit()
        except UserError:
            self._hand_on()
            raise
        try:
            self._validate()
        except BaseException:  # a signal too: what was trained is not to be lost over its last validation
            if self._module.trainer.world_size == 1:  # of several processes the others may wait within the validation
                self._hand_on()
            raise
        self._hand_on()

    def look_again(self) -> None:
        """Conclude once more if a callback's `on_fit_end` has changed what was handed on.

        Raises:
            UserError: under FSDP2, where what is sharded cannot be put together any more.
        """
        if self._kept is None or not any(gathered(self._kept != self._checksum())):
            return
        module = self._module
        assert module.adapter is not None
        if is_sharded(module.adapter.model):
            raise UserError(
                "A callback changed what was trained in on_fit_end, when a sharded model cannot be read any more. What "
                "was saved is what stood before. Have the callback do it in on_train_end."
            )
        module.verdict = None
        module.to(module.trainer.strategy.root_device)
        self.conclude()
        module.cpu()

    def _validate(self) -> None:
        trainer = self._module.trainer
        if not trainer.enable_validation or not self._is_due():
            return
        with self._module.undisturbed():
            loop_progress.validate(trainer)
            if self.last is not None and self._is_due():  # a callback has others in the model at each validation
                callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
                trainer.callbacks = [one for one in callbacks if is_ours(one)]  # type: ignore[attr-defined]
                try:
                    loop_progress.validate(trainer)
                finally:
                    trainer.callbacks = callbacks  # type: ignore[attr-defined]

    def _is_due(self) -> bool:
        here = self._checksum()
        return any(gathered(self.last is None or self.last["state"] != here))

    def _agree(self) -> None:
        """What the first process holds is what is saved, should a callback have written in that one alone."""
        module = self._module
        assert module.adapter is not None
        if is_sharded(module.adapter.model) or len(set(gathered(self._checksum()))) == 1:
            return
        state = {name: value.cpu() for name, value in module.adapter.state().items()}
        module.adapter.load_state(module.trainer.strategy.broadcast(state), "the first process")

    def _hand_on(self) -> None:
        trainer: Any = self._module.trainer
        self._kept = self._checksum()
        for callback in trainer.callbacks:
            if isinstance(callback, TaskCallback):
                callback.after_training(trainer, self._module)

    def _checksum(self) -> str:
        assert self._module.adapter is not None
        return state_checksum(self._module.adapter)


class Validated(Callback):
    """Tells a task's `Ending` of each validation in a training; behind the user's callbacks."""

    def __init__(self, ending: Ending) -> None:
        self._ending = ending

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ending.forget_measured()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if _counts(trainer):
            self._ending.measures()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if _counts(trainer):
            self._ending.validation_ends()


def _counts(trainer: Trainer) -> bool:
    return trainer.state.fn == "fit" and not trainer.sanity_checking
