"""LightningCLI with peftlight's tasks, data and conventions. Everything taken from its private side is in this file."""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

import peftlight.strategies  # noqa: F401  # so that LoRA and the others are found by their short names
from peftlight.callbacks import PredictionWriter, Progress, RunRecord
from peftlight.config_errors.explain import explain
from peftlight.data import DataFamily
from peftlight.errors import UserError
from peftlight.tasks import PEFTModule
from peftlight.tasks.optimizer import DEFAULT_LEARNING_RATE
from peftlight.tasks.precision import default_precision

_DEFAULTS = {
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": DEFAULT_LEARNING_RATE}},
    "lr_scheduler": {"class_path": "peftlight.tasks.LinearWarmup"},
}
_RUN_FOLDER = "PEFTLIGHT_RUN_FOLDER"
"""Set by the first process for those that it starts."""


def run(arguments: Sequence[str]) -> None:
    """Parse `arguments` (a command and its options) and run the command.

    Raises:
        UserError: the configuration, the data or the model is not right.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    strict = {"exit_on_error": False, "allow_abbrev": False}
    before = sys.argv
    sys.argv = [before[0], *arguments]  # where Lightning looks, also to start further processes
    try:
        PeftlightCLI(
            PEFTModule,
            DataFamily,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            seed_everything_default=42,
            parser_kwargs={**strict, arguments[0]: strict},
            trainer_defaults={"log_every_n_steps": 10, "enable_model_summary": False},
        )
    except argparse.ArgumentError as error:
        raise UserError(explain(error, arguments)) from error
    finally:
        sys.argv = before


class PeftlightCLI(LightningCLI):
    """Lightning's four commands, with a run folder for each run and the framework's callbacks always there."""

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
            parser.add_subclass_arguments(classes, name, required=False, instantiate=False, skip=skip)
            parser.link_arguments(name, f"model.init_args.{name}")
        parser.set_defaults(_DEFAULTS)

    def _parse_ckpt_path(self) -> None:
        """Lightning lays the checkpoint's hyperparameters over the command line here; the command line must win."""
        path = self.config.get(f"{self.config.subcommand}.ckpt_path")
        if path and (Path(path) / "adapter_config.json").is_file():
            raise UserError(
                f"--ckpt_path {path} is the folder of an adapter. Give the run's checkpoint, checkpoints/last.ckpt "
                "beside it; from Python, peftlight.load_adapter reads the folder."
            )

    def instantiate_classes(self) -> None:
        """Values that only the classes themselves can refuse are errors of the configuration too."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise UserError(explain(error, sys.argv[1:])) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer", default={})
        folder = self._new_run_folder(config)
        own, chosen = self._callbacks(folder, config), _as_list(config.get("callbacks"))
        kept = [callback for callback in own if not _replaced(callback, chosen)]
        settings = {
            "logger": self._loggers(folder, config),
            "precision": config.get("precision") or self._precision(config.get("accelerator")),
            "default_root_dir": str(folder),
        }
        return super().instantiate_trainer(callbacks=[*kept, *chosen], **settings, **kwargs)

    def _callbacks(self, folder: Path, config: Any) -> list[Callback]:
        text = self._parser(self.subcommand).dump(self.config[str(self.subcommand)], skip_unset=False)
        seed = self._get(self.config, "seed_everything")
        own: list[Callback] = [RunRecord(folder, text, sys.argv[1:], seed), PredictionWriter(folder)]
        if config.get("enable_progress_bar") is not False:
            own.append(Progress())
        if config.get("enable_checkpointing") is not False:
            own.append(ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True))
        return own

    def _loggers(self, folder: Path, config: Any) -> list[Logger] | bool:
        if config.get("logger") is False or config.get("fast_dev_run"):
            return False
        own = CSVLogger(folder.parent, name="", version=folder.name, flush_logs_every_n_steps=10)
        chosen = config.get("logger")
        return [own, *(_as_list(chosen) if chosen is not True else [])]

    def _precision(self, accelerator: Any) -> str:
        dtype = self._get(self.config_init, "model").dtype_of_base
        return default_precision(dtype, on_gpu=accelerator in ("auto", "gpu", "cuda"))

    def _new_run_folder(self, config: Any) -> Path:
        """A folder that no other run has; the first process makes it, those that it starts are told."""
        if getattr(rank_zero_only, "rank", 0) != 0:
            return Path(os.environ.get(_RUN_FOLDER, "runs"))
        root = Path(config.get("default_root_dir") or "runs")
        strategy = type(self._get(self.config_init, "model").strategy).__name__
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{self.subcommand}-{strategy}"
        folder = _made(root, stem)
        os.environ[_RUN_FOLDER] = str(folder)
        return folder


def _made(root: Path, stem: str) -> Path:
    number = 1
    while True:
        folder = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise UserError(f"The run folder {folder} cannot be made: {error.strerror}. "
                            "Set --trainer.default_root_dir to a folder that can be written.") from error  # fmt: skip


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _replaced(own: Callback, chosen: Sequence[Callback]) -> bool:
    """Whether the user chose another callback for the same thing; all others are added to ours."""
    kinds = (Checkpoint, ProgressBar)
    return any(isinstance(own, kind) and isinstance(other, kind) for kind in kinds for other in chosen)
