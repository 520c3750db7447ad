"""The proof that a recorded run can be had again: its first steps, trained anew from its own configuration."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peftlight.callbacks.first_steps import FirstStep
from peftlight.console import say
from peftlight.errors import UserError, nearest
from peftlight.proofs.agreement import Outcome
from peftlight.proofs.trainings import Trained, failure, only_run, peftlight
from peftlight.resume.init_adapter import InitialAdapter
from peftlight.typed import fits

_NEAR = 1e-5
"""How far losses may be apart, as a share, to count as those of the same training on another machine."""
_FACTS = ("device", "threads", "processes", "precision", "seed", "data_fingerprint", "python")
"""What run.json says of the circumstances; beside these, the versions of packages."""


@dataclass(frozen=True)
class ReplayedStep:
    """One optimizer step, as recorded and as it is now."""

    number: int
    recorded: Mapping[str, Any]
    now: Mapping[str, Any]

    @property
    def equal(self) -> bool:
        """Whether loss and batches are the same, the loss bit for bit."""
        return self.recorded == self.now

    @property
    def near(self) -> bool:
        """Whether the batches are the same, and the loss nearly."""
        return self.recorded["batches"] == self.now["batches"] and self.apart <= _NEAR

    @property
    def apart(self) -> float:
        """How far the losses are apart, as a share of the recorded one."""
        loss, other = self.recorded["loss"], self.now["loss"]
        if loss is None or other is None:
            return 0.0 if loss is other else float("inf")
        return 0.0 if loss == other else abs(loss - other) / max(abs(loss), 1e-30)

    def __str__(self) -> str:
        if self.recorded["batches"] != self.now["batches"]:
            return f"step {self.number} is the first that differs: it has other rows, or their content is another"
        return (f"step {self.number} is the first that differs: loss {self.recorded['loss']!r} recorded, "
                f"{self.now['loss']!r} now")  # fmt: skip


def replay_run(run: Path, steps: int) -> Outcome:
    """Train the first steps of the run in `run` again, and compare them with what it recorded.

    Of a run that was resumed with another configuration those before count, trained by the configuration it began with.

    Raises:
        UserError: the folder is no run that recorded its first steps, what it began with is not there, or the training
            fails.
    """
    record = _record_of(run)
    config, recorded = _beginning(run, record)
    more = "; it recorded no more" if steps > len(recorded) else ""
    steps = min(steps, len(recorded))
    say(f"training {steps} steps of {run} again{more}")
    with tempfile.TemporaryDirectory(prefix="peftlight-replay-") as folder:
        again = _again([*_of_config(config, Path(folder)), *_of_adapter(record)], steps, Path(folder))
    pairs = zip(recorded, again["first_steps"], strict=False)
    compared = [ReplayedStep(number, *pair) for number, pair in enumerate(pairs, 1)]
    return _verdict(compared, list(_changed(record, again)))


def _verdict(steps: list[ReplayedStep], changed: list[str]) -> Outcome:
    circumstances = "\n  ".join([f"\n  What is not as it was: {changed[0]}", *changed[1:]]) if changed else ""
    if all(step.equal for step in steps):
        return Outcome(True, f"{len(steps)} of {len(steps)} steps, losses bit for bit{circumstances}")
    wrong = next((step for step in steps if not step.near), None)
    if wrong is not None:
        return Outcome(False, f"{wrong}{circumstances or _no_cause(steps)}")
    furthest = max(steps, key=lambda step: step.apart)
    return Outcome(True, f"{len(steps)} of {len(steps)} steps within {_NEAR:g}: the losses are not the same bits, but "
                         f"no further apart than {furthest.apart:.1e} of their size, in step {furthest.number}"
                         f"{circumstances}")  # fmt: skip


def _no_cause(steps: list[ReplayedStep]) -> str:
    where = "already the first step" if not steps[0].near else "the steps before are the same"
    return f"\n  Versions, device and data are as they were; {where}: was code of your own changed, or run.json?"


def _record_of(run: Path) -> dict[str, Any]:
    if not run.is_dir():
        beside = [one.name for one in run.parent.iterdir()] if run.parent.is_dir() else []
        raise UserError(f"There is no run {run}.{nearest(run.name, beside)}")
    if not (run / "run.json").is_file() or not (run / "config.yaml").is_file():
        raise UserError(f"{run} is no folder of a run: it has no run.json or no config.yaml.")
    try:
        record = Trained(run, run).record()
    except ValueError as error:
        raise UserError(f"{run / 'run.json'} is not JSON: {error}.") from None
    steps = record.get("first_steps")
    if not steps:
        raise UserError(f"{run} has no first steps in its run.json: it is not a fit, it was made by an older version, "
                        "it ended before they were written, or it began from a checkpoint without them.")  # fmt: skip
    if not fits(steps, list[FirstStep]):
        raise UserError(f"{run / 'run.json'}: first_steps is damaged; expected a loss and batches for each step.")
    return record


def _beginning(run: Path, record: Mapping[str, Any]) -> tuple[str, list[FirstStep]]:
    """The configuration that the run began with, as YAML, and the recorded steps that were trained by it."""
    config, steps = (run / "config.yaml").read_text(encoding="utf-8"), record["first_steps"]
    for resumed in reversed(record.get("resumed", [])):
        if resumed["step"] == 0:
            break  # nothing of what came before was kept
        if "config_before" in resumed:
            config, steps = resumed["config_before"], steps[: resumed["step"]]
    return config, steps


def _of_config(config: str, folder: Path) -> list[str]:
    """The options that give the configuration; its file is written into the folder."""
    machines = yaml.safe_load(config)["trainer"]["num_nodes"]
    if machines != 1:
        raise UserError(f"The run was trained on {machines} machines (trainer.num_nodes), so it cannot be replayed on "
                        "this one alone: its batches would be others.")  # fmt: skip
    file = folder / "begun.yaml"
    file.write_text(config, encoding="utf-8")
    return [f"--config={file}"]


def _of_adapter(record: Mapping[str, Any]) -> list[str]:
    """The option that gives the adapter with whose weights the run began, if there was one."""
    if "initialised_from" not in record:
        return []
    name, sha256 = record["initialised_from"]["adapter"], record["initialised_from"]["sha256"]
    if InitialAdapter(name).facts()["sha256"] != sha256:
        raise UserError(f"The run began with the adapter {name} (sha256 {sha256}), and what is there now is another: "
                        "put the old one back to replay the run.")  # fmt: skip
    return [f"--init_adapter={name}"]


def _again(begun: list[str], steps: int, folder: Path) -> dict[str, Any]:
    """What run.json says of the first steps of the training that these options begin."""
    options = [*begun, f"--trainer.default_root_dir={folder}", "--trainer.logger=null"]
    stop = ["--trainer.callbacks+=peftlight.proofs.witness.StopAfter", f"--trainer.callbacks.steps={steps}"]
    done = peftlight(["fit", *options, *stop])
    if done.returncode:
        raise failure(done)
    return Trained(only_run(folder), folder).record()


def _changed(record: Mapping[str, Any], again: Mapping[str, Any]) -> Iterator[str]:
    """What of the circumstances is not the same, one sentence each."""
    for name in _FACTS:
        if record.get(name) != again.get(name):
            yield f"{name}: {record.get(name)} recorded, {again.get(name)} now"
    for name, version in record.get("versions", {}).items():
        if version != again["versions"].get(name):
            yield f"{name} {version} recorded, {again['versions'].get(name)} now"
