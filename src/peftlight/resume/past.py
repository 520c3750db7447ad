"""The run that `--resume` or `--ckpt_path` goes on with: found by its folder, its checkpoint, or its configuration."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from peftlight.checkpoint_files import newest_whole, read_checkpoint
from peftlight.errors import UserError, listed, nearest
from peftlight.resume.changes import SEED, Change, differences, plain_name, shown
from peftlight.resume.limits import PATIENCE, TIME, Done, done_in, reached
from peftlight.resume.recorded import Recorded, classes_in, read_recorded

CONFIG, RUN, CHECKPOINTS = "config.yaml", "run.json", "checkpoints"
_KNOWN = ("peftlight.", "torch.", "lightning.")
_SHOWN = 6
_ENDED = {"finished": "is finished", "stopped by max_time": "was stopped by its time limit"}
"""States of run.json that a training ends in by itself."""


@dataclass(frozen=True)
class Past:
    """A run at one of its checkpoints."""

    checkpoint: Path
    folder: Path | None
    """The run's folder; None where the checkpoint lies elsewhere."""
    step: int
    """Optimizer steps that were done."""
    facts: Recorded = field(default_factory=Recorded)
    done: Done = field(default_factory=Done)
    passed_over: Sequence[str] = ()
    """What is to be said of newer checkpoints that are of no use."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration that the checkpoint was trained by.

        Raises:
            UserError: it has none: it was not written by the command line.
        """
        if "config" not in self.facts:
            raise UserError(f"{self.checkpoint} does not say by which configuration it was trained, so no change of it "
                            "would be noticed. From Python: Trainer.fit(..., ckpt_path=...).")  # fmt: skip
        return dict(yaml.safe_load(self.facts["config"]))

    def arguments(self) -> list[str]:
        """The options that give this run's configuration.

        Raises:
            UserError: it is that of a checkpoint alone, and names code of the user's.
        """
        if self.folder is not None and (self.folder / CONFIG).is_file():
            return ["--config", str(self.folder / CONFIG)]
        text = json.dumps(self.config)
        strange = [path for path in classes_in(self.config) if not path.startswith(_KNOWN)]
        if strange or '"trust_remote_code": true' in text:
            raise UserError(f"The configuration in {self.checkpoint} runs other code than peftlight's: "
                            f"{listed(strange) or 'trust_remote_code'}. If you trust it, give the configuration "
                            "yourself: --config FILE")  # fmt: skip
        return ["--config", text]


def open_past(name: str) -> Past:
    """The run of a folder at its newest whole checkpoint, or of a checkpoint's file.

    Lightning reads the file once more when the model is there: the tensors are not held until then.

    Raises:
        UserError: there is no such run, it has no checkpoint, or the checkpoint is damaged.
    """
    path = Path(name)
    if path.is_dir():
        return _at(*newest_whole(_checkpoints(path)))
    if not path.exists():
        around = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"There is no run and no checkpoint {name}.{nearest(path.name, around, 2)}")
    content = read_checkpoint(path)
    if "optimizer_states" not in content:
        raise UserError(f"{path} holds weights alone, so a training cannot go on from it: it was saved with "
                        "save_weights_only, or by another program.")  # fmt: skip
    return _at(path, content)


def _at(path: Path, content: Mapping[str, Any], passed_over: Sequence[str] = ()) -> Past:
    """The run at a checkpoint with this content."""
    folder = path.resolve().parent.parent
    ours = path.resolve().parent.name == CHECKPOINTS and (folder / RUN).is_file()
    shown_folder = path.parent.parent if path.parent.name == CHECKPOINTS else folder
    return Past(path, shown_folder if ours else None, int(content.get("global_step", 0)), read_recorded(content, path),
                done_in(content), passed_over)  # fmt: skip


def _checkpoints(folder: Path) -> Path:
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is the folder of an adapter. --resume takes the run's folder, {folder.parent}; to "
                        f"begin a new run from the adapter: --init_adapter {folder}")  # fmt: skip
    if folder.name == CHECKPOINTS:
        return folder
    if (folder / CHECKPOINTS).is_dir():
        return folder / CHECKPOINTS
    if (folder / RUN).is_file():
        raise UserError(f"{folder} has no checkpoints: it ended before the first was written, or they went elsewhere. "
                        "Start it again, or give the checkpoint: --resume FILE")  # fmt: skip
    there = listed(sorted(one.name for one in folder.iterdir()), 5) or "nothing"
    raise UserError(f"{folder} is no run: it has no {RUN} and no {CHECKPOINTS}. In it: {there}.")


def check_unfinished(past: Past, changes: Sequence[Change], config: Mapping[str, Any]) -> None:
    """See that there is something left to train, or to write: a training that was over may lack its adapter.

    Args:
        past: what is gone on with.
        changes: the allowed ones.
        config: the resolved configuration.

    Raises:
        UserError: the run is finished, and no change gives it more to do.
    """
    run = read_run(past.folder) if past.folder else {}
    limits, ended = reached(past.done, config), str(run.get("state")) in _ENDED
    anew = bool(past.facts) and not reached(past.done, past.config)
    longer = ("trainer.max_epochs", "trainer.max_steps", "trainer.callbacks")
    unlimited = run.get("state") == "finished" and not any(change.key.startswith(longer) for change in changes)
    if unlimited or (limits and (ended or anew)):
        raise UserError(_over(past, run, limits, config))


def _over(past: Past, run: Mapping[str, Any], limits: Sequence[str], config: Mapping[str, Any]) -> str:
    """That nothing is left to train, and what gives more to do."""
    where, steps = past.folder or past.checkpoint, run.get("steps", past.step)
    state = _ENDED.get(str(run.get("state")), "has nothing left to train")
    values = [f"{name} {_value(config, name)}" for name in limits if name != PATIENCE]
    by = f": it came to {listed([*values, *(name for name in limits if name == PATIENCE)])}" if limits else ""
    total = ", which counts over all its resumes" if TIME in limits else ""
    raised = [name for name in limits if name not in (TIME, PATIENCE)] or ([] if limits else ["trainer.max_epochs"])
    options = [*(f"--{name} N" for name in raised), *([f"--{TIME} LONGER"] if TIME in limits else [])]
    allowed = f" --allow_changes {' '.join(raised)}" if raised else ""
    on = "" if PATIENCE in limits else f" To train on: {' '.join(options)}{allowed}."
    new = f" To begin a new run from what it trained: --init_adapter {where}" if past.folder else ""
    return f"The run {where} {state} ({steps} steps){by}{total}.{on}{new}"


def _value(config: Mapping[str, Any], name: str) -> str:
    return shown(config["trainer"][name.removeprefix("trainer.")])


def newest_unfinished(root: Path, config: Mapping[str, Any], allowed: Sequence[str]) -> Past:
    """The newest run under `root` that this configuration made and that is not finished.

    Args:
        root: the folder of runs.
        config: a resolved configuration.
        allowed: keys in which the run may differ.

    Raises:
        UserError: there is none.
    """
    runs = sorted(training_runs(root), key=lambda run: str(run[1].get("started")), reverse=True)
    differ = {folder: _first_difference(folder, config, allowed) for folder, _ in runs}
    same = [(folder, run) for folder, run in runs if differ[folder] is None]
    for folder, run in same:
        if run.get("state") != "finished":
            return open_past(str(folder))
    if same:
        past = open_past(str(same[0][0]))
        raise UserError(f"There is no unfinished run of this configuration in {root}. "
                        f"{_over(past, same[0][1], reached(past.done, config), config)}")  # fmt: skip
    each = [f"  {folder}, {_shown_state(run)}: {differ[folder]}" for folder, run in runs[:_SHOWN]]
    more = [f"  and {len(runs) - _SHOWN} older ones"] if len(runs) > _SHOWN else []
    there = "\n".join([" What is there:", *each, *more]) if runs else ""
    raise UserError(f"There is no run of this configuration in {root} to resume.{there}\n"
                    "  To start one, leave out --resume; to resume another, name it: --resume RUN")  # fmt: skip


def _shown_state(run: Mapping[str, Any]) -> str:
    state = str(run.get("state"))
    return "running or killed" if state == "running" else state  # who is killed can write no other


def training_runs(root: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The folders under `root` of what `fit` did, with what their run.json says."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        run = read_run(folder)
        if run.get("command", [""])[:1] == ["fit"] and (folder / CONFIG).is_file():
            yield folder, run


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says; nothing where there is none that can be read."""
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no run, or one of another program
        return {}
    return found if isinstance(found, dict) else {}


def _first_difference(folder: Path, config: Mapping[str, Any], allowed: Sequence[str]) -> str | None:
    """The first difference that is not allowed; None where there is none."""
    try:
        recorded = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return f"its {CONFIG} cannot be read"
    names = tuple(plain_name(name) for name in allowed)
    for change in differences(recorded, config):
        drawn = change.key == SEED and change.now is True
        if not drawn and not any(f"{change.key}.".startswith(f"{name}.") for name in names):
            return f"{change.key} is {shown(change.was)} there, {shown(change.now)} here"
    return None
