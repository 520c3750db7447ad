"""What a checkpoint says of the run that wrote it: its configuration, its data, its base, its code."""

import dataclasses
import hashlib
import importlib.metadata
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

import yaml
from lightning.pytorch import Trainer

from peftlight.errors import UserError
from peftlight.interop.base_hash import fingerprint
from peftlight.tasks import PEFTModule
from peftlight.typed import misfit

KEY = "run"
"""Where it stands in a checkpoint."""
PACKAGES = ("peftlight", "torch", "lightning", "transformers", "tokenizers", "datasets", "bitsandbytes",
            "torchmetrics", "jsonargparse", "safetensors")  # fmt: skip


class Lines(TypedDict):
    """The state of metrics.csv."""

    rows: int
    """How many there were when the checkpoint was written."""
    pending: dict[str, float]
    """The row of the step that was just done, and `step`: it is logged after the checkpoint; empty if there is none."""


class Recorded(TypedDict, total=False):
    """What stands under `KEY`."""

    config: str
    """The resolved configuration as YAML."""
    data_fingerprint: str | None
    processes: int
    global_batch: int | None
    """Rows of an optimizer step; None where the data does not say it."""
    precision: str
    versions: dict[str, str | None]
    base: dict[str, str | None]
    """The fields of `base_hash.Fingerprint`."""
    code: dict[str, str]
    """Of each class that is not a package's, by its path, the sha256 of its file."""
    seconds: float
    training_seconds: float
    """Of the run so far, those before a resume included."""
    metrics: Lines
    values: dict[str, float]
    """The metrics as last logged."""


def facts_of(trainer: Trainer, module: PEFTModule, config: str) -> Recorded:
    """What is known as soon as a training begins."""
    assert module.adapter is not None
    datamodule: Any = getattr(trainer, "datamodule", None)
    batch = getattr(datamodule, "batch_size", None)
    return {
        "config": config,
        "data_fingerprint": getattr(datamodule, "fingerprint", None),
        "processes": trainer.world_size,
        "global_batch": batch and batch * trainer.accumulate_grad_batches * trainer.world_size,
        "precision": str(trainer.precision),
        "versions": versions(),
        "base": dataclasses.asdict(fingerprint(module.adapter)),
        "code": code_of(yaml.safe_load(config)),
    }


def versions() -> dict[str, str | None]:
    """The versions of Python and of what a training rests on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def code_of(config: Any) -> dict[str, str]:
    """Of each class in a configuration that is the user's own, the sha256 of its file."""
    found = {}
    for path in classes_in(config):
        file = getattr(sys.modules.get(path.rpartition(".")[0]), "__file__", None)
        if file and not path.startswith("peftlight.") and "-packages" not in file:
            found[path] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def classes_in(config: Any) -> Iterator[str]:
    """The paths of the classes that a configuration names."""
    if isinstance(config, Mapping):
        if isinstance(config.get("class_path"), str):
            yield config["class_path"]
        config = list(config.values())
    for value in config if isinstance(config, list) else ():
        yield from classes_in(value)


def read_recorded(checkpoint: Mapping[str, Any], where: object) -> Recorded:
    """What a checkpoint records; nothing if the command line did not write it.

    Raises:
        UserError: it has a value of another kind.
    """
    found = checkpoint.get(KEY) or {}
    if not isinstance(found, dict):
        raise UserError(f"{where}: '{KEY}' is a {type(found).__name__}; expected keys and their values.")
    if wrong := misfit(found, Recorded):
        raise UserError(f"{where}: {KEY}.{wrong[0]} is not {wrong[1]}; the checkpoint was damaged.")
    return found  # type: ignore[return-value]
