"""The user's loggers: they write into the run's folder if no other place is given, and get its configuration."""

import importlib
import importlib.util
import inspect
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger

from peftlight.callbacks.metrics_file import MetricsFile
from peftlight.callbacks.run_record import RunRecord

RUN_FOLDER = "{run_folder}"
"""In a configuration: the folder of the run, which has its name only once the configuration is read."""
_PLACES = ("save_dir", "root_dir")
"""What loggers call the folder in which they write."""
_MUST_BE_TOLD = (CSVLogger, TensorBoardLogger)
"""Of Lightning's loggers those whose place has no default."""


@contextmanager
def run_folder_by_default() -> Iterator[None]:
    """Within the block the place of every one of Lightning's loggers has a default, in its signature too."""
    made: list[Any] = [kind.__init__ for kind in _MUST_BE_TOLD]
    before = [function.__defaults__ for function in made]
    for function, defaults in zip(made, before, strict=True):
        function.__defaults__ = (RUN_FOLDER, *defaults)  # save_dir is the first parameter
    try:
        yield
    finally:
        for function, defaults in zip(made, before, strict=True):
            function.__defaults__ = defaults


def settle_places(sections: Sequence[Any], given: Collection[str | None]) -> None:
    """Put the run's folder into the configuration of loggers that have no place of their own.

    Args:
        sections: the class and the options of each; changed in place.
        given: what the user gave of any logger; a place that is the default's is the user's if it is among them.
    """
    for options, kind in ((section.get("init_args"), _kind(section)) for section in sections):
        for name in (name for name in _PLACES if options and name in options):
            default = inspect.signature(kind).parameters[name].default
            if options[name] == default and (default is None or default not in given):
                options[name] = RUN_FOLDER if default in (None, RUN_FOLDER) else f"{RUN_FOLDER}/{default}"


def make_loggers(sections: Sequence[Any], folder: Path) -> list[Logger]:
    """The loggers of settled sections, in a run of that folder."""
    return [_made(section, folder) for section in sections]


def _made(section: Any, folder: Path) -> Logger:
    kind, options = _kind(section), _options(section)
    for name, value in options.items():
        if name in _PLACES and str(value).startswith(RUN_FOLDER):
            options[name] = str(Path(str(value).replace(RUN_FOLDER, str(folder), 1)))
    if issubclass(kind, MLFlowLogger) and not options.get("tracking_uri"):
        options |= _mlflow_store(folder.resolve(), options)
    made: Logger = kind(**options)
    return made


def _kind(section: Any) -> type[Logger]:
    module, _, name = section["class_path"].rpartition(".")
    kind: type[Logger] = getattr(importlib.import_module(module), name)
    return kind


def _mlflow_store(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Newer versions of MLflow write into a data base alone; without its package they are left to say so."""
    if importlib.util.find_spec("sqlalchemy") is None:
        return {}
    there = options.get("artifact_location") or (folder / "mlruns").as_uri()
    return {"tracking_uri": f"sqlite:///{folder / 'mlflow.db'}", "artifact_location": there}


def _options(section: Any) -> dict[str, Any]:
    parts = (section.get("init_args"), section.get("dict_kwargs"))
    return {name: value for part in parts for name, value in (dict(part) if part else {}).items()}


class LoggedConfig(Callback):
    """Gives each of the user's loggers the resolved configuration and the run's folder, once."""

    def __init__(self, record: RunRecord) -> None:
        """
        Args:
            record: has the configuration and the folder.
        """
        self.run_record = record
        self._done = False

    def _log(self, trainer: Trainer) -> None:
        if self._done:
            return
        self._done = True
        config = self.run_record.config
        facts = {**flat(yaml.safe_load(config)), "run_folder": str(self.run_record.folder)}
        for logger in (each for each in trainer.loggers if not isinstance(each, MetricsFile)):
            logger.log_hyperparams(facts)
            experiment: Any = getattr(logger, "experiment", None)
            if hasattr(experiment, "add_text"):  # TensorBoard's
                experiment.add_text("config", "".join(f"    {line}\n" for line in config.splitlines()))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer)


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """The options by their keys with dots, as on the command line; lists, and dicts that are values, as JSON."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        path = above if key in ("init_args", "class_path") else f"{above}.{key}" if above else key
        if isinstance(value, Mapping) and value and (key in ("init_args", "trainer") or "class_path" in value):
            found.update(flat(value, path))
        else:
            found[path] = json.dumps(value) if isinstance(value, Mapping | list) else value
    return found
