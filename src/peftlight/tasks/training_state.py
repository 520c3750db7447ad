"""What a checkpoint holds beside Lightning's own, so that a training goes on from it bit for bit."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

import peftlight.tasks.loader_position as loader_position
import peftlight.tasks.loop_progress as loop_progress
from peftlight import random_state
from peftlight.errors import UserError
from peftlight.gather import gathered
from peftlight.shards import local
from peftlight.tasks.label_window import LabelWindow

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


class TrainingState:
    """The random numbers of each process, the place in the epoch, and the window of gradients that is open.

    A checkpoint has, for each process, `random_states`, `loader_states`, with which the epoch's loader began and what
    it comes to, and `window`, the open accumulation, or None; and once `progress`, that of the loops.
    """

    def __init__(self, module: "PEFTModule", window: LabelWindow) -> None:
        self._module, self._window = module, window
        self._random: dict[str, Any] = {}
        self._set_aside: dict[str, Any] | None = None
        self._epoch: dict[str, Any] | None = None
        self._first: dict[str, Any] = {}
        self._past: dict[str, Any] | None = None
        self._progress: loop_progress.Progress | None = None

    def load_data(self) -> None:
        """Have Lightning make the training loader and iterate it; now, for its order may hang on random numbers."""
        trainer = self._module.trainer
        before = random_state.taken()
        trainer.fit_loop.setup_data()
        self._epoch = self._first = loader_position.first_state(trainer, before)

    def unload_data(self) -> None:
        """Have `load_data` make all loaders anew, with the random numbers with which it made these."""
        trainer = self._module.trainer
        loader_position.set_generators(trainer, self._first["generators"])
        random_state.put_back(self._first["random"])
        trainer.fit_loop._combined_loader = trainer.fit_loop.epoch_loop.val_loop._combined_loader = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put it into a checkpoint from which a training can go on; every process has to call it."""
        trainer = self._module._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING or "optimizer_states" not in checkpoint:
            return
        loader = {"begun": self._epoch, "generators": loader_position.generator_states(trainer)}
        ended = self._set_aside is not None
        with loop_progress.as_before_validate(trainer) if ended and trainer.validating else nullcontext():
            progress = loop_progress.progress_of(trainer)
        repeats = trainer.validating and progress["validates"]  # the validation, as a whole
        random = self._set_aside or (self._random if repeats else random_state.taken())
        mine = {"random": random, "loader": loader, "window": self._open_window()}
        parts = gathered(mine)
        checkpoint["random_states"] = [part["random"] for part in parts]
        checkpoint["loader_states"] = [part["loader"] for part in parts]
        checkpoint["window"] = None if mine["window"] is None else [part["window"] for part in parts]
        checkpoint["progress"] = progress

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take from a checkpoint what `put_back` needs; nothing outside of a fit.

        Raises:
            UserError: other processes than those that the checkpoint is of.
        """
        self._past, trainer = None, self._module._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        if "random_states" not in checkpoint:
            rank_zero_warn("The checkpoint holds no random states, so the training does not go on exactly as it would "
                           "have: other dropout, and an epoch that is begun again.")  # fmt: skip
            return
        self._check_processes(len(checkpoint["random_states"]), trainer.world_size, checkpoint["window"] is not None)
        loop_progress.settle(trainer, checkpoint["loops"]["fit_loop"], checkpoint["progress"])
        keys = ("random_states", "loader_states", "window", "progress")
        self._past = {key: checkpoint[key] for key in keys}

    def _check_processes(self, there: int, here: int, in_window: bool) -> None:
        if there == here or ("processes" in self._module.allow_changes and not in_window):
            return
        why = "It holds gradients of each of them, so that cannot be changed" if in_window else "Start as many"
        raise UserError(f"The checkpoint is of a training with {there} processes, and here there are {here}. {why}: "
                        f"set trainer.devices and trainer.num_nodes to make {there}.")  # fmt: skip

    def put_back(self) -> None:
        """Go on just there, when Lightning has restored the rest and is about to train; nothing in a new training."""
        if self._past is None:
            return
        past, self._past = self._past, None
        trainer = self._module.trainer
        # The loader is put to its place here.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        rank = min(trainer.global_rank, len(past["random_states"]) - 1)
        loader_position.renew(trainer, past["progress"]["in_epoch"])
        if past["progress"]["in_epoch"]:
            self._epoch = past["loader_states"][rank]["begun"]
            epoch: Any = trainer.fit_loop.epoch_progress.current
            batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            loader_position.move_to(trainer, epoch.processed, batches.processed, self._epoch)
        if past["window"] is not None:
            self._reopen_window(past["window"][rank])
        loader_position.set_generators(trainer, past["loader_states"][rank]["generators"])
        self._random = past["random_states"][rank]
        random_state.put_back(self._random)
        loop_progress.go_on(trainer, past["progress"])
        self._progress = past["progress"] if past["progress"]["validates"] else None

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within the block the training is over: were it to go on, it would know nothing of what is drawn there."""
        self._set_aside = random_state.taken()
        try:
            yield
        finally:
            random_state.put_back(self._set_aside)
            self._set_aside = None

    def batch_ends(self) -> None:
        """Note with which random numbers a validation begins, should one come now."""
        self._random = random_state.taken()

    def validation_starts(self) -> None:
        """The one that was still to come has begun."""
        if self._progress is not None:
            loop_progress.count_steps(self._module.trainer, self._progress)
            self._progress = None

    def epoch_starts(self) -> None:
        """Note with which random numbers a new epoch begins."""
        trainer = self._module.trainer
        trainer.fit_loop.epoch_loop.restarting = False  # whatever it may be after: a new epoch has not begun before
        if trainer.fit_loop.is_resuming:
            self._epoch = loader_position.epoch_state(trainer)
            loader_position.iterate(trainer)
        elif trainer.current_epoch > 0:
            self._epoch = loader_position.epoch_state(trainer)

    def _open_window(self) -> dict[str, Any] | None:
        if (window := self._window.state()) is None:
            return None
        gradients = {
            name: local(parameter.grad).cpu()
            for name, parameter in self._module.named_parameters()
            if parameter.grad is not None
        }
        return {**window, "gradients": gradients}

    def _reopen_window(self, state: dict[str, Any]) -> None:
        self._window.reopen(state, self._module.device)
        for name, parameter in self._module.named_parameters():
            if name in state["gradients"]:
                parameter.grad = torch.zeros_like(parameter)
                local(parameter.grad).copy_(state["gradients"][name])
