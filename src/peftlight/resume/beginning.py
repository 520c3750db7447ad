"""How a fit begins: anew, or where a run stands; settled once its configuration is known."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from peftlight.config_errors.given import find, read_given
from peftlight.console import say
from peftlight.environment import CHECKPOINT, is_first_process
from peftlight.errors import UserError, listed
from peftlight.resume.asked import Asked
from peftlight.resume.best_and_last import OF_A_TRAINER
from peftlight.resume.changes import Change, allowed_among, differences, refuse
from peftlight.resume.continuation import Continuation
from peftlight.resume.init_adapter import InitialAdapter
from peftlight.resume.limits import COUNTS, reached
from peftlight.resume.past import Past, check_unfinished, newest_unfinished, open_past
from peftlight.resume.remembered import covered, remembered

_NOTHING = (None, "", "null", "~")


class Beginning:
    """What is gone on with, and by which arguments the configuration is found."""

    def __init__(self, asked: Asked, arguments: Sequence[str]) -> None:
        """
        Args:
            asked: what the user asked for.
            arguments: a command and all other options.

        Raises:
            UserError: there is no such run.
        """
        self.asked, self.given = asked, list(arguments)
        self.past: Past | None = None
        self.initial = InitialAdapter(asked.init_adapter) if asked.init_adapter else None
        self.changes: list[Change] = []
        self.before: list[str] = []
        """What earlier resumes allowed."""
        self.arguments = self.given
        """A command and all options, those that a run brings with it included."""
        if asked.resume is None:
            return
        begun_from = find(read_given(arguments), ("ckpt_path",))
        if begun_from is not None and begun_from.value not in _NOTHING:
            raise UserError(
                "--resume goes on with a run, --ckpt_path begins a new one from a checkpoint: give one of them."
            )
        has_config = any(word.partition("=")[0] in ("--config", "-c") for word in arguments)
        if not asked.resume and not has_config:
            raise UserError("--resume alone goes on with the newest run of a configuration: give it, --config FILE; "
                            "or name the run: --resume RUN")  # fmt: skip
        told = None if is_first_process() else os.environ.get(CHECKPOINT)  # by now there may be newer ones
        if told or asked.resume:
            self.past = open_past(told or asked.resume)
            if not has_config:
                self.arguments = [arguments[0], *self.past.arguments(), *arguments[1:]]

    @property
    def folder(self) -> Path | None:
        """The folder of the run that goes on; None: a new run."""
        return self.past.folder if self.past is not None else None

    def seed(self, chosen: Any) -> Any:
        """The seed of the run that goes on, where a new one was to be drawn."""
        return self.past.config.get("seed_everything") if chosen is True and self.past is not None else chosen

    def settle(self, config: Mapping[str, Any]) -> None:
        """Compare the resolved configuration with the one that is gone on with.

        Raises:
            UserError: there is no run of this configuration, it is finished, or what differs was not allowed.
        """
        allowed = self.asked.allow_changes
        if self.asked.resume == "" and self.past is None:
            self.past = newest_unfinished(Path(config["trainer"]["default_root_dir"] or "runs"), config, allowed)
        elif self.asked.resume is None and config.get("ckpt_path"):
            if self.initial is not None:
                raise UserError("--ckpt_path brings an adapter with it, and --init_adapter another: give one of them.")
            self.past = _begun_from(str(config["ckpt_path"]))
        if self.past is None:
            if allowed:
                raise UserError(
                    "--allow_changes says in what a run may differ that is gone on with: give --resume too, "
                    "or leave it out."
                )
            return
        self._check_place(config["trainer"]["default_root_dir"])
        if self.past.facts:
            every = differences(self.past.config, {**config, "seed_everything": self.seed(config["seed_everything"])})
            self.changes = allowed_among(every, allowed, config, read_given(self.given))
            self.changes += self._allowed_before([one for one in every if one not in self.changes], config)
            what = f"{self.folder or self.past.checkpoint} at step {self.past.step}"
            limits = [name for name in reached(self.past.done, config) if name in COUNTS]
            was_over = bool(reached(self.past.done, self.past.config))
            refuse(
                [one for one in every if one not in self.changes], read_given(self.arguments), what, limits, was_over
            )
        else:
            say(f"{self.past.checkpoint} does not say by which configuration it was trained, so changes of it go "
                "unnoticed.")  # fmt: skip
        check_unfinished(self.past, self.changes, config)
        os.environ[CHECKPOINT] = str(self.past.checkpoint)

    def _check_place(self, root: str | None) -> None:
        given = find(read_given(self.given), ("trainer", "default_root_dir"))
        if self.folder is None or given is None or root is None or Path(root).resolve() == self.folder.resolve().parent:
            return
        raise UserError(
            f"{given.where}: the run {self.folder} goes on in its own folder, not in {root}: give "
            f"--trainer.default_root_dir {self.folder.parent}, or leave it out. To go on elsewhere, copy the "
            "checkpoint out of the run and give the copy: --resume FILE"
        )

    def _allowed_before(self, changes: Sequence[Change], config: Mapping[str, Any]) -> list[Change]:
        """Those of the changes that an earlier resume allowed."""
        assert self.past is not None
        self.before = remembered(self.past)
        if self.before:
            say(f"allowed by an earlier resume, of which there is no checkpoint yet: {listed(self.before)}")
        return covered(changes, self.before, self.past, config)

    @property
    def allowed(self) -> tuple[str, ...]:
        """All names that are allowed to change, by earlier resumes too."""
        return tuple(dict.fromkeys([*self.asked.allow_changes, *self.before]))

    def callbacks(self, config: str) -> list[Callback]:
        """What holds the training to its past; `config` is the resolved configuration as YAML."""
        asked = self.asked.allow_changes
        return [Continuation(self.past, self.changes, asked, config, self.before)] if self.past else []


def _begun_from(checkpoint: str) -> Past:
    """A checkpoint from which a new run begins."""
    if checkpoint in OF_A_TRAINER:
        raise UserError(f"--ckpt_path {checkpoint} names no file, and a new run has no checkpoints yet. To go on with "
                        "a run: --resume RUN")  # fmt: skip
    return dataclasses.replace(open_past(checkpoint), folder=None)
