"""The configuration that an adapter was trained by: its task with the task's options, its data, its precision."""

import inspect
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, get_type_hints

from lightning.pytorch import LightningDataModule

from peftlight import data as families
from peftlight import tasks
from peftlight.class_paths import UnknownClass, found, is_ours
from peftlight.config_errors.given import read_given
from peftlight.errors import UserError, listed, nearest
from peftlight.interop.folder import OF_RUN
from peftlight.interop.run_facts import SETTINGS, Section, read_settings
from peftlight.on_data.own_options import made_options, names_class, own_names
from peftlight.own_modules import import_module
from peftlight.tasks import PEFTModule
from peftlight.typed import fits, kind_of

T = TypeVar("T")
_OF_TRAINING = set(inspect.signature(PEFTModule.__init__).parameters) - {"self"}
"""Options of every task; of what is trained already they say nothing new."""
ROWS = {"source", "validation_source", "test_source", "predict_source", "subset", "columns", "labels",
        "delimiter", "quoting", "validation_size", "split_seed", "batch_size", "num_workers", "tokenizer", "pad_token",
        "max_length", "max_empty", "max_target_length", "prefix", "template", "template_without_input",
        "image_processor", "image_size", "image_mean", "image_std", "flip"}  # fmt: skip
"""Options of data that a configuration decides which was only found near an adapter: which rows are read, and how they
are put to a model. Where files are written is the user's alone."""


@dataclass(frozen=True)
class RunConfig:
    """What is read of a configuration; what it does not say is empty."""

    where: str = "--data"
    """As an error message begins."""
    trusted: bool = True
    """Whether the user named it, so that its classes may be others than ours, and all of its options count; a file that
    was only found near an adapter must not decide which code runs or where is written."""
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None

    def task(self) -> type[PEFTModule] | None:
        """The task's class; None where the configuration names none.

        Raises:
            UserError: there is no such class, or it is not ours and the configuration not trusted.
        """
        return self._class(self.model, tasks, PEFTModule) if "class_path" in self.model else None

    def task_options(self) -> dict[str, Any]:
        """The options that the task itself has.

        Raises:
            UserError: it does not have one of them, or one is of the wrong kind.
        """
        kind = self.task()
        given = self.model.get("init_args") or {}
        own = {key: value for key, value in given.items() if key not in _OF_TRAINING}
        return {} if kind is None else self._checked(kind, own, _OF_TRAINING)

    def make_data(self) -> LightningDataModule:
        """The data: a family of ours, or a class of the user's.

        Raises:
            UserError: the class, an option or a value is not right.
        """
        if "class_path" not in self.data:
            raise UserError(f"{self.where} names no class of data: data: {{class_path: TextClassification, ...}}")
        kind = self._class(self.data, families, LightningDataModule)
        options = self._checked(kind, self.data.get("init_args") or {})
        if not self.trusted:
            read = ROWS if is_ours(kind) else {*ROWS, *own_names(kind)}
            options = {name: value for name, value in options.items() if name in read}
        needed = [name for name, one in inspect.signature(kind).parameters.items() if one.default is one.empty]
        if missing := [name for name in needed if name not in options]:
            raise UserError(f"{self.where}: {kind.__name__} needs {listed(missing)}.")
        return kind(**options)

    def _class(self, section: Mapping[str, Any], room: ModuleType, parent: type[T]) -> type[T]:
        path = str(section["class_path"])
        name = path.removeprefix(f"{room.__name__}.")
        module, _, leaf = path.rpartition(".")
        if name in room.__all__:
            kind: Any = getattr(room, name)
        elif kind := found(path, parent):
            return kind
        elif not module:
            raise UserError(f"{self.where}: there is no class {name!r}.{nearest(name, room.__all__)}")
        elif not self.trusted:
            said = f"{self.where} names the class {path}, which is not among those of {room.__name__}."
            raise UnknownClass(f"{said} If you trust it, give the configuration by name: --config {self.where}", path)
        else:
            import_module(module, f"{self.where}: the class {path}")
            kind = getattr(sys.modules[module], leaf, None)
        if not (isinstance(kind, type) and issubclass(kind, parent)):
            raise UserError(f"{self.where}: {path} is no {parent.__name__}.")
        return kind

    def _checked(self, kind: type, options: Mapping[str, Any], skip: Collection[str] = ()) -> dict[str, Any]:
        if not is_ours(kind):
            if not self.trusted and (named := [name for name, value in options.items() if names_class(value)]):
                raise UserError(f"{self.where} names a class in {listed(named)} of {kind.__name__}. If you trust it, "
                                f"give the configuration by name: --config {self.where}")  # fmt: skip
            return made_options(kind, options, self.where, skip)
        hints = get_type_hints(kind.__init__)  # type: ignore[misc]
        hints = {**dict.fromkeys(inspect.signature(kind).parameters, Any), **hints}
        for name, value in options.items():
            if name not in hints:
                raise UserError(f"{self.where}: {kind.__name__} has no option {name!r}.{nearest(name, hints)}")
            if not fits(value, hints[name]):
                raise UserError(f"{self.where}: {name} is {value!r}; expected {kind_of(hints[name])}.")
        return dict(options)


def read_config(path: Path, trusted: bool = True) -> RunConfig:
    """What the configuration in a file says.

    Raises:
        UserError: the file cannot be read, or is no configuration.
    """
    read_given(["validate", f"--config={path}"])
    said = read_settings(path)
    precision = (said.get("trainer") or {}).get("precision")
    if not fits(precision, str | int | None):
        raise UserError(f"{path}: trainer.precision is {precision!r}; expected text such as bf16-mixed.")
    return RunConfig(str(path), trusted, _section(said.get("model")), _section(said.get("data")), precision)


def config_of_run(folder: Path) -> RunConfig:
    """What the configuration says in the run of an adapter's folder; nothing where the adapter lies elsewhere.

    Raises:
        UserError: it cannot be read.
    """
    folder = folder.resolve()
    run = folder.parent if folder.name == OF_RUN else folder
    path = run / SETTINGS
    return read_config(path, trusted=False) if path.is_file() and (run / OF_RUN).is_dir() else RunConfig()


def _section(given: Section | str | None) -> dict[str, Any]:
    return {"class_path": given} if isinstance(given, str) else dict(given or {})
