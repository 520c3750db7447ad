"""The user's configuration, trained at small size in processes of its own."""

import importlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftlight import own_modules
from peftlight.checkpoint_files import read_checkpoint
from peftlight.console import say
from peftlight.errors import UserError
from peftlight.proofs.agreement import Leaves, leaves
from peftlight.proofs.witness import END

_SMALL: dict[str, Any] = {
    "trainer.max_epochs": -1, "trainer.max_time": "null", "trainer.fast_dev_run": "false", "trainer.logger": "null",
    "trainer.limit_val_batches": 2, "trainer.num_sanity_val_steps": 0, "trainer.val_check_interval": "null",
    "trainer.check_val_every_n_epoch": 1, "trainer.log_every_n_steps": 1, "trainer.num_nodes": 1,
}  # fmt: skip
"""What makes a training small, on this machine alone; its own loggers are left out."""
_SHOWN = 3000
"""Characters of what a process said that are shown if it fails."""


@dataclass(frozen=True)
class Trained:
    """What one training left behind."""

    run: Path
    """Its run folder."""
    kept: Path
    """The folder of its `Witness`."""

    def first_steps(self) -> Leaves:
        """Loss and batches of each step, by the step's number."""
        return {f"step {number}": step for number, step in enumerate(self.record()["first_steps"], 1)}

    def record(self) -> dict[str, Any]:
        """What run.json holds."""
        found: dict[str, Any] = json.loads((self.run / "run.json").read_text(encoding="utf-8"))
        return found

    def config(self) -> dict[str, Any]:
        """The resolved configuration."""
        found: dict[str, Any] = yaml.safe_load((self.run / "config.yaml").read_text(encoding="utf-8"))
        return found

    def trusts_code(self) -> bool:
        """Whether the base's own code may run; its classes, a strategy of the user's say, are known from now on."""
        options = self.config()["model"]
        for key, path in leaves(options).items():
            if key.endswith("class_path"):
                importlib.import_module(path.rpartition(".")[0])
        return bool(options["init_args"]["trust_remote_code"])

    def checkpoint(self) -> dict[str, Any]:
        """All that was kept of the training at its end."""
        return read_checkpoint(self.kept / END)


@dataclass(frozen=True)
class Bench:
    """Where trainings of one configuration are made."""

    given: Sequence[str]
    """The configuration, as the options of `peftlight fit`."""
    folder: Path
    """Where all that they write goes; it exists."""

    def train(self, name: str, steps: int, changes: Mapping[str, Any] | None = None, **witness: Any) -> Trained:
        """Train so many optimizer steps, two thirds of them in the first epoch at most.

        Args:
            name: of the training's folder.
            steps: optimizer steps.
            changes: options over the configuration.
            witness: options of `Witness`.

        Raises:
            UserError: the configuration, the data or the model is not right.
            RuntimeError: the training failed for another reason.
        """
        root = self.folder / name
        kept = root / "kept"
        kept.mkdir(parents=True)
        small = {**_SMALL, "trainer.max_steps": steps, "trainer.default_root_dir": root / "runs", **(changes or {})}
        options = [f"--{key}={value}" for key, value in small.items()]
        added = ["--trainer.callbacks+=peftlight.proofs.witness.Witness"]
        added += [f"--trainer.callbacks.{key}={_text(value)}"
                  for key, value in {"folder": kept, "epoch": max(1, steps * 2 // 3), **witness}.items()]  # fmt: skip
        say(f"{name}: {steps} steps")
        until_done(["fit", *self.given, *options, *added], root / "runs", kept)
        return Trained(only_run(root / "runs"), kept)


def until_done(arguments: Sequence[str], root: Path, kept: Path) -> None:
    """Run the command line in a new process; after each kill by its `Witness` resume the run in a further one."""
    marks: set[str] = set()
    while True:
        done = peftlight(arguments)
        new = {path.name.partition(",")[0] for path in kept.glob("killed *")} - marks
        if done.returncode == 0:
            return
        if not new:
            raise failure(done)
        marks |= new
        say(f"  {new.pop()}; resumed by a new process")
        arguments = ["fit", "--resume", str(only_run(root))]


def peftlight(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run our command line in a process of its own, with the user's classes as here."""
    classes = [word for name in own_modules.imported for word in (own_modules.OPTION, name)]
    command = [sys.executable, "-m", "peftlight", *arguments, *classes]
    return subprocess.run(command, capture_output=True, text=True)


def failure(done: "subprocess.CompletedProcess[str]") -> Exception:
    """What to raise for a training that failed."""
    said = re.split("peftlight: (?:unexpected )?error: ", done.stderr)[-1].strip()
    if done.returncode == 2:
        return UserError(said)
    code = done.returncode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return RuntimeError(f"a training of the proof {how}: {said[-_SHOWN:]}")


def only_run(root: Path) -> Path:
    """The one run folder in a folder of runs."""
    (run,) = [path.parent for path in root.glob("*/config.yaml")]
    return run


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
