"""The checkpoints that `--ckpt_path best` and `last` mean to an evaluation: those of the newest run of its model."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from peftlight.checkpoint_files import newest_whole
from peftlight.config_errors.given import Given
from peftlight.errors import UserError, listed
from peftlight.resume.changes import differences
from peftlight.resume.past import CHECKPOINTS, CONFIG, RUN, training_runs

BEST, LAST, HPC = OF_A_TRAINER = ("best", "last", "hpc")
"""Lightning's words for checkpoints of a trainer that has trained; on the command line a new one begins."""


def best_or_last(word: str, config: Mapping[str, Any], given: Sequence[Given]) -> Path:
    """The checkpoint that was best by the metric of the run's ModelCheckpoint, or the newest whole one.

    Args:
        word: one of Lightning's words.
        config: the resolved configuration of the evaluation. The run is that whose own config.yaml was given, or else
            the newest of the folder of runs with the same model.
        given: what the user gave.

    Raises:
        UserError: there is no such run, or it keeps no best checkpoint.
    """
    if word == HPC:
        raise UserError(
            "--ckpt_path hpc names no file: give the one that the job left, --ckpt_path FILE, or take last."
        )
    run = _run(config, given, word)
    last, content, _ = newest_whole(run / CHECKPOINTS)
    return last if word == LAST else _best(run, content)


def _run(config: Mapping[str, Any], given: Sequence[Given], word: str) -> Path:
    files = {Path(one.where.rpartition(":")[0]) for one in given if not one.on_command_line}
    named = [file.parent for file in files if file.name == CONFIG and (file.parent / RUN).is_file()]
    if named:
        return named[0]
    root = Path(config["trainer"]["default_root_dir"] or "runs")
    runs = sorted(training_runs(root), key=lambda run: str(run[1].get("started")), reverse=True)
    for folder, _ in runs:
        if (folder / CHECKPOINTS).is_dir() and not list(_differing(folder, config)):
            return folder
    known = [f"{folder.name} ({listed(_differing(folder, config), 2) or 'no checkpoints'})" for folder, _ in runs]
    there = f" What is there: {listed(known, 4)}." if known else ""
    raise UserError(
        f"--ckpt_path {word} takes the newest run of this model, and {root} has none.{there} Give the run's own "
        "configuration, --config RUN/config.yaml, or the checkpoint: --ckpt_path FILE"
    )


def _differing(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    try:
        recorded = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        changes = differences({"model": recorded["model"]}, {"model": config["model"]})
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        yield f"its {CONFIG} cannot be read"
        return
    yield from (f"{change.key} is {change.was}" for change in changes)


def _best(run: Path, content: Mapping[str, Any]) -> Path:
    kept = [
        state
        for name, state in content.get("callbacks", {}).items()
        if name.startswith("ModelCheckpoint") and isinstance(state, dict) and state.get("monitor")
    ]
    if len(kept) != 1:
        kinds = f"{len(kept)} metrics ({listed(state['monitor'] for state in kept)})" if kept else "no metric"
        raise UserError(
            f"The run {run} keeps its best checkpoints by {kinds}: name the file, --ckpt_path FILE, or take "
            "--ckpt_path last. To keep a best one: --trainer.callbacks+=ModelCheckpoint --trainer.callbacks.monitor "
            "val_loss"
        )
    path = Path(str(kept[0].get("best_model_path")))
    here = path if path.is_file() else run / CHECKPOINTS / path.name  # the run may have been moved
    if not here.is_file():
        raise UserError(f"The best checkpoint of the run {run} is {path}, and it is not there any more.")
    return here
