"""Two more moments in which a callback may act, which Lightning has not."""

from typing import TYPE_CHECKING

from lightning.pytorch import Callback, Trainer

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


class TaskCallback(Callback):
    """A callback of a task of peftlight; both moments do nothing unless they are overridden."""

    def before_base(self, trainer: Trainer, module: "PEFTModule") -> None:
        """Called before the base is loaded, wherever the callback stands; the user's callbacks see it in `setup`."""

    def after_training(self, trainer: Trainer, module: "PEFTModule") -> None:
        """Called when a training has ended and every `on_train_end` is done: what stands now is what is kept.

        It is audited and validated, and still on its device. Called again should an `on_fit_end` change it. Also called
        where the audit fails: `module.audit()` then raises.
        """
