"""What may be given at each place of a configuration, read from the signatures of the classes chosen there."""

import inspect
import sys
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import peftlight.data  # noqa: F401  # whose classes are those that are known
from peftlight.config_errors.given import Given, Path, class_given
from peftlight.tasks import PEFTModule

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")
_TOP = {
    "model": PEFTModule,
    "data": LightningDataModule,
    "trainer": dict,
    "optimizer": Optimizer,
    "lr_scheduler": LRScheduler | ReduceLROnPlateau,
    "seed_everything": bool | int,
    "config": str,
}
_SET_ELSEWHERE = {
    "self",
    "params",
    "optimizer",
    "lr_scheduler",
    "model",
    "dataloaders",
    "train_dataloaders",
    "val_dataloaders",
    "datamodule",
}
"""Parameters that are no options: they are filled in, or are keys of the top."""
_ELSEWHERE = {
    "learning_rate": ("optimizer", "lr"),
    "warmup_steps": ("lr_scheduler", "warmup"),
    "warmup_ratio": ("lr_scheduler", "warmup"),
    "num_train_epochs": ("trainer", "max_epochs"),
    "epochs": ("trainer", "max_epochs"),
    "gradient_accumulation_steps": ("trainer", "accumulate_grad_batches"),
    "max_grad_norm": ("trainer", "gradient_clip_val"),
    "output_dir": ("trainer", "default_root_dir"),
    "seed": ("seed_everything",),
    "per_device_train_batch_size": ("data", "batch_size"),
    "max_seq_length": ("data", "max_length"),
    "cutoff_len": ("data", "max_length"),
    "dataset": ("data", "source"),
    "model_name_or_path": ("model", "base_model"),
    "torch_dtype": ("model", "dtype"),
    "r": ("model", "strategy", "rank"),
    "lora_r": ("model", "strategy", "rank"),
    "lora_alpha": ("model", "strategy", "alpha"),
    "lora_dropout": ("model", "strategy", "dropout"),
}
"""What other frameworks call it, and where it is here."""
_AROUND: list[Path] = [
    ("model", "strategy"),
    ("model",),
    ("data",),
    ("optimizer",),
    ("lr_scheduler",),
    ("trainer",),
    (),
]


class Places:
    """The places of one command's configuration, as far as `given` says which classes are chosen."""

    def __init__(self, command: str, given: Sequence[Given]) -> None:
        self.command, self.given = command, given

    def parameters(self, path: Path) -> dict[str, Any]:
        """The keys that can be given under `path`, with their types."""
        if not path:
            return {**_TOP, **_accepted(getattr(Trainer, self.command))}
        found: dict[str, Any] = {}
        for kind in self.classes(path):
            found.update(parameters(kind))
        return found

    def annotation(self, path: Path) -> Any:
        """The type of the value at `path`; None if it is not known."""
        return self.parameters(path[:-1]).get(path[-1]) if path else None

    def classes(self, path: Path) -> list[type]:
        """The class chosen at `path`, or all that could be."""
        if path == ("trainer",):
            return [Trainer]
        chosen, known = class_given(self.given, path), self.known(path)
        kind = _resolved(chosen.value or "", known) if chosen else None
        return [kind] if kind else list(known.values())

    def known(self, path: Path) -> dict[str, type]:
        """The classes that can be chosen at `path`, by their short names; of several with one name the first."""
        found: dict[str, type] = {}
        for base in bases(self.annotation(path)):
            for kind in _subclasses(base):
                found.setdefault(kind.__name__, kind)
        return found

    def beside(self, path: Path) -> list[Given]:
        """What stands on the level of the class path at `path`."""
        return [one for one in self.given if one.path[:-1] == path and one.level[-2:-1] != ("init_args",)]

    def holding(self, key: str) -> list[Path]:
        """Where `key` can be given."""
        if key in _ELSEWHERE:
            return [_ELSEWHERE[key]]
        return [(*path, key) for path in _AROUND if key in self.parameters(path)]

    def all_keys(self) -> list[str]:
        """Every key that can be given."""
        return [*_ELSEWHERE, *(key for path in _AROUND for key in self.parameters(path))]


def parameters(kind: type) -> dict[str, Any]:
    """The parameters of a class with their types, those that it passes on to its bases included."""
    found: dict[str, Any] = {}
    for base in kind.__mro__:
        if "__init__" not in vars(base):
            continue
        function = vars(base)["__init__"]
        found = {**_accepted(function), **found}
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
            break
    return found


def _accepted(function: Any) -> dict[str, Any]:
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # a name in an annotation of someone else's class need not exist
        hints = {}
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [name for name, p in inspect.signature(function).parameters.items() if p.kind in named]
    return {name: hints.get(name) for name in names if name not in _SET_ELSEWHERE}


def bases(annotation: Any) -> list[type]:
    """The classes of which `annotation` wants an instance, chosen by a class path."""
    if isinstance(annotation, type) and not typing.get_args(annotation):
        plain = annotation.__module__ in ("builtins", "datetime", "pathlib") or annotation is Tensor
        return [] if plain else [annotation]
    return [base for inner in typing.get_args(annotation) if not isinstance(inner, str) for base in bases(inner)]


def _subclasses(kind: type) -> Iterator[type]:
    children: list[type] = kind.__subclasses__()
    for child in children:
        if not child.__name__.startswith("_") and not inspect.isabstract(child):
            yield child
        yield from _subclasses(child)


def _resolved(name: str, known: dict[str, type]) -> type | None:
    module, _, base = name.rpartition(".")
    kind = getattr(sys.modules.get(module), base, None) if module else known.get(name)
    return kind if isinstance(kind, type) else None
