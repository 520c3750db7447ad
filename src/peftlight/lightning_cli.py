"""LightningCLI with peftlight's tasks, data and conventions; what is taken from LightningCLI's private side is here."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import peftlight.processes  # so that Lightning knows fsdp2
import peftlight.strategies  # noqa: F401  # so that LoRA and the others are found by their short names
from peftlight import own_modules
from peftlight.callbacks import Checkpoints, FirstSteps, PredictionWriter, Progress, RunRecord, Stopping
from peftlight.callbacks.chosen_loggers import LoggedConfig, make_loggers, run_folder_by_default, settle_places
from peftlight.callbacks.metrics_file import MetricsFile
from peftlight.checkpoint_files import AtomicCheckpoints
from peftlight.class_changes import ClassChanges
from peftlight.config_errors.dropped import refuse_dropped
from peftlight.config_errors.explain import explain
from peftlight.config_errors.given import read_given
from peftlight.config_errors.of_the_run import explained
from peftlight.config_errors.trainer_limits import check_limits
from peftlight.console import kept_for_log, say
from peftlight.environment import HANDED_ON, RUN_FOLDER, is_first_process
from peftlight.environment_options import options_of_environment, seeds_put_back
from peftlight.errors import UserError, listed
from peftlight.processes.size import check_size
from peftlight.resume.asked import take_out
from peftlight.resume.beginning import Beginning
from peftlight.resume.best_and_last import OF_A_TRAINER, best_or_last
from peftlight.run_folder import RunFolder, new_run_folder
from peftlight.tasks import PEFTModule
from peftlight.tasks.distribution import refuse_other_distribution
from peftlight.tasks.optimizer import DEFAULT_LEARNING_RATE
from peftlight.tasks.precision import default_precision
from peftlight.watching import Watch

_DEFAULTS: dict[str, dict[str, Any]] = {
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": DEFAULT_LEARNING_RATE}},
    "lr_scheduler": {"class_path": "peftlight.tasks.LinearWarmup"},
}
"""The class in a place where none is chosen; what is set for it here is no default of another one."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments` (a command and its options) and run the command.

    Raises:
        UserError: the configuration, the data or the model is not right.
    """
    shows_help = any(word == "-h" or "help" in word or "print_config" in word for word in arguments)
    set_parsing_settings(docstring_parse_attribute_docstrings=shows_help)  # it reads the source of every class
    _silence_remarks()
    imports, others = own_modules.take_out(arguments)
    own_modules.import_each(imports)
    beginning = Beginning(*take_out(others))
    options, remarks = options_of_environment(arguments[0], os.environ)
    beginning.arguments = [arguments[0], *options, *beginning.arguments[1:]]
    before = sys.argv
    sys.argv = [before[0], *arguments]  # where Lightning looks, also to start further processes
    try:
        with kept_for_log(), seeds_put_back(), run_folder_by_default():
            for remark in [] if shows_help else remarks:
                say(remark)
            PeftlightCLI(beginning)
    except argparse.ArgumentError as error:
        raise UserError(explain(error, beginning.arguments)) from error
    except Exception as error:
        if told := explained(error, beginning.arguments):
            raise told from error
        raise
    finally:
        sys.argv = before
        for name in HANDED_ON:  # else a process that is started for a later run would take this one's
            os.environ.pop(name, None)


class PeftlightCLI(LightningCLI):
    """Lightning's four commands, with a run folder for each run and the framework's callbacks always there."""

    def __init__(self, beginning: Beginning) -> None:
        """
        Args:
            beginning: how a fit begins, and all arguments.
        """
        self.beginning = beginning
        self.folder: RunFolder | None = None
        self.record: RunRecord | None = None
        self.remarks: list[str] = []
        """What is said of the configuration at the start."""
        self._logger: Any = None
        strict = {"exit_on_error": False, "allow_abbrev": False}
        try:
            super().__init__(
                PEFTModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                save_config_callback=None,
                seed_everything_default=42,
                parser_kwargs={**strict, beginning.arguments[0]: strict},
                trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
            )
        except BaseException:
            self._leave(nothing_done=self.record is None or not self.record.began)
            raise
        self._leave(nothing_done=self.record is not None and self.record.was_trial)

    def _leave(self, nothing_done: bool) -> None:
        if self.folder is not None:
            self.folder.leave(nothing_done)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only the one that is run: a parser for each costs time at every start."""
        return {name: skipped for name, skipped in LightningCLI.subcommands().items() if name in sys.argv[1:2]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        schedulers = (LRScheduler, ReduceLROnPlateau)
        for name, classes, skip in (
            ("optimizer", (Optimizer,), {"params"}),
            ("lr_scheduler", schedulers, {"optimizer"}),
        ):
            parser.add_subclass_arguments(
                classes, name, required=False, instantiate=False, skip=skip, fail_untyped=False
            )
            parser.link_arguments(name, f"model.init_args.{name}")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """A run that goes on brings its configuration with it, and the command line lies over it."""
        command, *options = self.beginning.arguments
        changes = ClassChanges(command, read_given(self.beginning.arguments), _DEFAULTS)
        self.config = _with_plain_texts(parser.parse_args([command, *changes.by_default(), *options]))
        plain = yaml.safe_load(self._as_yaml())
        refuse_dropped(self.beginning.arguments, plain)
        taken = changes.taken(plain)
        for one in taken:
            if one.fate != "kept":
                for place in _places_of(one.path):
                    self.config[f"{command}.{place}"] = one.default
        said = listed([str(one) for one in taken if one.fate != "default"], len(taken))
        self.remarks = [f"taken over from another class: {said}"] if said else []

    def _parse_ckpt_path(self) -> None:
        """Lightning lays the checkpoint's hyperparameters over the command line here; the command line must win."""
        path = self.config.get(f"{self.config.subcommand}.ckpt_path")
        if path == "":
            raise UserError("ckpt_path is an empty text: name a checkpoint, or leave it out.")
        if path and (Path(path) / "adapter_config.json").is_file():
            raise UserError(
                f"--ckpt_path {path} is the folder of an adapter. Give the run's checkpoint, checkpoints/last.ckpt "
                "beside it; from Python, peftlight.load_adapter reads the folder."
            )
        if self.config.subcommand != "fit" and path in OF_A_TRAINER:
            given, config = read_given(self.beginning.arguments), yaml.safe_load(self._as_yaml())
            found = str(best_or_last(path, config, given))
            self.config[self.config.subcommand]["ckpt_path"] = found
            say(f"{path}: {found}")
        if self.config.subcommand == "fit":
            self.beginning.settle(yaml.safe_load(self._as_yaml()))
            self.config["fit"]["seed_everything"] = self.beginning.seed(self.config["fit"]["seed_everything"])

    def _as_yaml(self) -> str:
        command = str(self.config.subcommand)
        text: str = self._parser(command).dump(self.config[command], skip_unset=False)
        return text

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        options: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        return {**options, "ckpt_path": self.beginning.past.checkpoint} if self.beginning.past else options

    def instantiate_classes(self) -> None:
        """Values that only the classes themselves can refuse are errors of the configuration too."""
        trainer = self._get(self.config, "trainer")
        self._logger, trainer["logger"] = trainer.get("logger"), None  # they are made when the run has its folder
        given = [one.value for one in read_given(self.beginning.arguments) if one.path[:2] == ("trainer", "logger")]
        settle_places(_sections(self._logger), given)
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise UserError(explain(error, self.beginning.arguments)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        self._get(self.config, "trainer")["logger"] = self._logger
        check_limits(self.beginning.arguments, config)
        refuse_other_distribution(config.get("strategy"))
        folder = self._run_folder(config)
        self.model.initial = self.beginning.initial
        own, chosen = self._callbacks(folder, config), _as_list(config.get("callbacks"))
        kept = [callback for callback in own if not _replaced(callback, chosen)]
        settings = {
            "logger": self._loggers(folder, config),
            "plugins": _with_checkpoints(_as_list(config.get("plugins"))),
            "precision": config.get("precision") or self._precision(config.get("accelerator")),
            "default_root_dir": str(folder),
        }
        every = [*kept, *chosen, Stopping()]  # it ends a step that all others have seen
        trainer = super().instantiate_trainer(callbacks=every, **settings, **kwargs)
        check_size(trainer)
        return trainer

    def _callbacks(self, folder: Path, config: Any) -> list[Callback]:
        text, seed = self._as_yaml(), self._get(self.config, "seed_everything")
        past, allowed = self.beginning.past, self.beginning.allowed
        self.record = RunRecord(folder, text, sys.argv[1:], seed, past, allowed, self.remarks)
        watch = Watch()
        watch.at_end = lambda error: self._leave(nothing_done=True)  # until the record is there to tell of it
        begins = self.beginning.callbacks(text)
        own = [
            watch,
            *begins,
            self.record,
            LoggedConfig(self.record),
            FirstSteps(self.record),
            PredictionWriter(folder),
        ]
        if config.get("enable_progress_bar") is not False:
            own.append(Progress())
        if config.get("enable_checkpointing") is not False:
            own.append(Checkpoints(folder / "checkpoints"))
        return own

    def _loggers(self, folder: Path, config: Any) -> list[Logger] | bool:
        if self._logger is False or config.get("fast_dev_run"):
            return False
        return [MetricsFile(folder), *make_loggers(_sections(self._logger), folder)]

    def _precision(self, accelerator: Any) -> str:
        dtype = self._get(self.config_init, "model").dtype_of_base
        return default_precision(dtype, on_gpu=accelerator in ("auto", "gpu", "cuda"))

    def _run_folder(self, config: Any) -> Path:
        """That of the run that goes on, or a new one; the first process makes it, those that it starts are told."""
        if not is_first_process():
            return Path(os.environ.get(RUN_FOLDER, "runs"))
        strategy = type(self.model.strategy).__name__
        root = Path(config.get("default_root_dir") or "runs")
        going_on = self.beginning.folder
        self.folder = RunFolder(going_on) if going_on else new_run_folder(root, f"{self.subcommand}-{strategy}")
        os.environ[RUN_FOLDER] = str(self.folder.path)
        return self.folder.path


def _places_of(path: Sequence[str]) -> Iterator[str]:
    """Where a key under a class stands in the configuration; what is linked into the task stands there too."""
    key = ".init_args.".join(path)
    yield key
    if path[0] in _DEFAULTS:
        yield f"model.init_args.{key}"


def _silence_remarks() -> None:
    """Of Lightning, about itself, and about workers where the rows were made into tokens beforehand."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector").addFilter(
        lambda record: "`weights_only` was not set" not in record.getMessage()  # our files are never read otherwise
    )
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")


def _with_plain_texts(config: Any) -> Any:
    """The configuration with plain texts for what is a kind of text, as defaults of Lightning's are: YAML knows none.

    A namespace is changed in place.
    """
    if isinstance(config, Namespace):
        for key, value in vars(config).items():
            setattr(config, key, _with_plain_texts(value))
    elif type(config) is list:
        return [_with_plain_texts(value) for value in config]
    elif isinstance(config, str) and isinstance(config, Enum):
        return str(config.value)
    return config


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _sections(logger: Any) -> list[Any]:
    """Those of a configuration that name classes: it may also be true or false."""
    return [each for each in _as_list(logger) if not isinstance(each, bool)]


def _with_checkpoints(plugins: list[Any]) -> list[Any]:
    """The plugins, and one that writes checkpoints whole or not at all, unless the user chose another."""
    chosen = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if chosen else [*plugins, AtomicCheckpoints()]


def _replaced(own: Callback, chosen: Sequence[Callback]) -> bool:
    """Whether the user chose another callback for the same thing; all others are added to ours."""
    kinds = (Checkpoint, ProgressBar)
    return any(isinstance(own, kind) and isinstance(other, kind) for kind in kinds for other in chosen)
