"""Lightning's finders of a learning rate or a batch size: they train at the start of a fit, and put their values in."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from peftlight import random_state
from peftlight.errors import UserError
from peftlight.train_mode import put_in_train_mode

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


class Search:
    """Has a training that follows a search be the one that begins with the found values.

    Lightning saves a checkpoint before its search, trains with no callbacks but its own, and restores the checkpoint.
    What that leaves out is put back here: the random numbers, the loaders, and the plan of all steps.
    """

    def __init__(self, module: "PEFTModule") -> None:
        self._module = module
        self.on = False
        """Whether a search goes on now."""
        self._fit_began = self._done = False
        self._random: dict[str, Any] = {}
        self._batch_size: int | None = None

    def forget(self) -> None:
        """A new fit, or what else the trainer does, is set up."""
        self.on = self._fit_began = self._done = False

    def begin(self) -> None:
        """A checkpoint is saved; before a fit has begun, it is a search that saves it.

        Raises:
            UserError: the fit goes on from a checkpoint, which has the values already.
        """
        trainer = self._module._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or self._fit_began:
            return
        if trainer.ckpt_path is not None or self._module.goes_on:
            raise UserError(
                "A training that goes on from a checkpoint keeps its learning rate and its batch size, so there is "
                "nothing to search: leave LearningRateFinder and BatchSizeFinder out of the callbacks."
            )
        self.on, self._random = True, random_state.taken()
        if not self._done:
            self._batch_size = self._size()

    def train(self) -> None:
        """Training starts: if it is a search's, without the callbacks that watch a real one.

        Raises:
            UserError: a training is going on around the search.
        """
        trainer: Any = self._module.trainer
        if self._module.guard in trainer.callbacks:
            return
        if not self.on:
            raise UserError(
                "A search for a learning rate or a batch size comes before the first step, from on_fit_start: what it "
                "trains in the midst of a training would be taken for a part of it."
            )
        assert self._module.adapter is not None
        put_in_train_mode(self._module.adapter)
        self._module._step.start(self._module.adapter)

    def end(self) -> bool:
        """Whether the checkpoint that is loaded ends a search, whose random numbers it puts back then."""
        if not self.on:
            return False
        self.on, self._done = False, True
        random_state.put_back(self._random)
        return True

    def settle(self) -> None:
        """The fit begins: after a search, with what it found.

        Raises:
            UserError: no learning rate was found, or the strategy began with other batches than those found.
        """
        self._fit_began = True
        module, trainer = self._module, self._module.trainer
        epochs = trainer.fit_loop.epoch_loop
        for loop in (trainer.fit_loop, epochs, epochs.val_loop):
            loop.on_iteration_done()  # after a search, of the Tuner too, they take the training for one that goes on
        if not self._done:
            return
        self._done = False
        self._check_found()
        if self._size() != self._batch_size and module.strategy.uses("prepare"):
            raise UserError(
                f"{type(module.strategy).__name__} begins with what it saw of the data in batches of {self._batch_size}"
                f" rows, before BatchSizeFinder found {self._size()}: set data.batch_size to that, and leave the "
                "finder out."
            )
        module._state.unload_data()
        trainer.strategy.setup_optimizers(trainer)
        trainer._logger_connector.reset_results()
        trainer._logger_connector.reset_metrics()

    def _check_found(self) -> None:
        trainer: Any = self._module.trainer
        for finder in (each for each in trainer.callbacks if isinstance(each, LearningRateFinder)):
            found = None if finder.optimal_lr is None else finder.optimal_lr.suggestion()
            if found is None:
                steps = len(finder.optimal_lr.results["loss"]) if finder.optimal_lr else 0
                raise UserError(
                    f"LearningRateFinder found no learning rate in {steps} steps: it leaves the first 10 and the last "
                    "out, and needs two of the others with a finite loss. It stops at the end of trainer.max_epochs, "
                    "and where the loss is early_stop_threshold times its best. Give more rows, more epochs or a "
                    "lower max_lr; or set optimizer.lr, and leave the finder out."
                )
            taken = "which is taken" if self._module.learning_rate is not None else "which is not taken (update_attr)"
            rank_zero_info(f"LearningRateFinder suggests a learning rate of {found:.3g}, {taken}")

    def _size(self) -> int | None:
        return getattr(self._module._datamodule(), "batch_size", None)


def with_rate(make: Callable[[Any], Optimizer], rate: float | None) -> Callable[[Any], Optimizer]:
    """What makes the optimizer, with the found learning rate in place of its own; None: as it is."""

    def made(parameters: Any) -> Optimizer:
        optimizer = make(parameters)
        own = optimizer.defaults.get("lr")
        if rate is not None and not own:
            raise UserError(f"{type(optimizer).__name__} has no learning rate that could be found: its lr is {own}.")
        for group in optimizer.param_groups if rate is not None else ():
            group["lr"] = rate if group["lr"] == own else rate * (group["lr"] / own)
        return optimizer

    return made


def check_taken(optimizer: Optimizer, rates: list[float], scheduler: object, found: float | None) -> None:
    """See that a schedule moves on the found rate.

    Raises:
        UserError: it sets rates of its own.
    """
    if found is not None and [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups] != rates:
        raise UserError(
            f"{type(scheduler).__name__} sets learning rates of its own, so the found one, {found:.3g}, would change "
            "nothing. Set its options by that, and leave LearningRateFinder out; or choose another --lr_scheduler."
        )
