"""Lightning's variables of the environment: read as options of the command line, or named where they are not read."""

import ast
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peftlight.errors import listed, nearest

_COMMANDS = ("fit", "validate", "test", "predict")
_TRAINER = "PL_TRAINER_"
_SEEDS = ("PL_GLOBAL_SEED", "PL_SEED_WORKERS")
"""Lightning sets them too, for the processes that it starts."""
_OF_FABRIC = ("LT_ACCELERATOR", "LT_STRATEGY", "LT_DEVICES", "LT_NUM_NODES", "LT_PRECISION")
"""Of Lightning's other trainer."""


def options_of_environment(command: str, variables: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The options that variables stand for, and what is to be said of them and of those that are not read.

    `PL_TRAINER_MAX_EPOCHS`, as Lightning's Trainer reads it, is `--trainer.max_epochs`. As LightningCLI reads them,
    `PL_FIT__OPTIMIZER__LR` is `--optimizer.lr` of `fit`, and `PL_FIT__CONFIG` is `--config`; the command may be left
    out. `PL_GLOBAL_SEED` is `--seed_everything`.

    Args:
        command: the command that is run; the variables of others are left alone.
        variables: those of the environment.
    """
    options, remarks, unread = [], [], []
    ours = {name for name, value in variables.items() if value and name.startswith(("PL_", *_OF_FABRIC))}
    for name in sorted(ours - {name for name in ours if _is_of_another(name, command)}):
        if key := _key(name, command):
            options.append(f"--{key}={_as_option(variables[name])}")
            remarks.append(f"from the environment, below files and options: {name} as {options[-1]}")
        elif name != "PL_SEED_WORKERS" or variables[name] != "1":  # LightningCLI sets it to 1
            near = nearest(name, _trainers(), 1) if name.startswith(_TRAINER) else ""
            unread.append(f"{name} ({near.strip()})" if near else name)
    if unread:
        remarks.append(f"set in the environment, and not read: {listed(unread)}")
    return sorted(options, key=lambda option: not option.startswith("--config=")), remarks


@contextmanager
def seeds_put_back() -> Iterator[None]:
    """A later run of this process does not take the seed that Lightning leaves for the processes of this one."""
    before = {name: os.environ.get(name) for name in _SEEDS}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _is_of_another(name: str, command: str) -> bool:
    return any(name.startswith(f"PL_{other.upper()}__") for other in _COMMANDS if other != command)


def _key(name: str, command: str) -> str:
    """The option that a variable stands for; empty where there is none."""
    if name == "PL_GLOBAL_SEED":
        return "seed_everything"
    if name in _trainers():
        return f"trainer.{name.removeprefix(_TRAINER).lower()}"
    every = name.removeprefix("PL_")
    words = every.removeprefix(f"{command.upper()}__")
    return words.lower().replace("__", ".") if words != every or "__" in words or words == "CONFIG" else ""


def _trainers() -> list[str]:
    """The variables that Lightning's Trainer reads."""
    from lightning.pytorch import Trainer

    return [f"{_TRAINER}{parameter.upper()}" for parameter in inspect.signature(Trainer).parameters]


def _as_option(value: str) -> str:
    """The value as the command line reads it; Lightning's Trainer takes Python's words."""
    try:
        read = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    return json.dumps(read) if isinstance(read, bool | list | tuple | dict | None) else value
