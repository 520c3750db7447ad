"""Adapters at work on a data set, each in turn on the one base; Lightning's Trainer does the work, and says nothing."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from peftlight import tasks
from peftlight.class_paths import found, unknown
from peftlight.errors import UserError, listed
from peftlight.interop import read_record
from peftlight.on_data.chosen_data import Choice, SameClasses, chosen_data
from peftlight.on_data.own_options import own_names
from peftlight.on_data.run_config import config_of_run, read_config
from peftlight.opened import Opened, named_folders, open_adapters
from peftlight.opening import Opening
from peftlight.pretrained import Dtype
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.tasks import PEFTModule
from peftlight.tasks.precision import default_precision


@dataclass
class OnData:
    """Adapters on their base, the task that they share, and the data."""

    opened: Opened
    task: type[PEFTModule]
    options: dict[str, Any]
    """The task's own."""
    data: LightningDataModule
    precision: str

    def module(self, name: str | None) -> PEFTModule:
        """The task with the adapter of that name in use, and no other; with None, with the bare base."""
        adapters = self.opened.adapters
        adapters.use(*([] if name is None else [name]))
        adapter = Adapter("base", self.opened.model, PEFTStrategy()) if name is None else adapters[name]
        module = self.task(base_model=self.opened.model, strategy=adapter.strategy, **self.options)
        module.take(adapter, self.opened.source)
        return module

    def trainer(self, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
        """A Trainer that writes nothing and shows nothing."""
        silent: dict[str, Any] = {
            "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        }  # fmt: skip
        own = [SameClasses(self.opened), *callbacks]
        return Trainer(devices=1, precision=self.precision, callbacks=own, **silent, **options)  # type: ignore[arg-type]


def open_on_data(given: Sequence[str], choice: Choice, config: str | None, opening: Opening) -> OnData:
    """Load adapters on their base, and find their task and the data.

    Args:
        given: for each adapter its folder, or NAME=FOLDER.
        choice: which data, where it is not that of the configuration.
        config: a configuration; None: that of the first adapter's run.
        opening: as for `open_adapters`; without a number format that in which the first adapter was trained is taken.

    Raises:
        UserError: an adapter cannot be loaded, or it is not known which data is meant.
    """
    first = next(iter(named_folders(given).values()))
    said = config_of_run(first) if config is None else read_config(Path(config))
    chosen = said.task() or _recorded_task(first)
    opened = open_adapters(given, replace(opening, dtype=opening.dtype or _recorded_dtype(first)))
    task = chosen or _task_of(opened)
    if task.auto_class != opened.auto_class:
        raise UserError(f"{said.where} is for {task.__name__}, but the adapters are on an {opened.auto_class}.")
    data = chosen_data(opened, task, said, choice)
    precision = said.precision if opening.dtype is None else None
    return OnData(opened, task, said.task_options(), data, precision or _precision_for(opened))


def predictions(on: OnData) -> list[dict[str, Any]]:
    """What the one adapter says of each row that is to be predicted, in their order."""
    (name,) = on.opened.adapters.names
    parts: Any = on.trainer().predict(on.module(name), datamodule=on.data)
    return sorted((record for part in parts for record in part), key=lambda record: int(record["id"]))


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block Lightning says nothing of devices, rows and workers; warnings that matter are shown."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            logger.setLevel(level)


def _recorded_dtype(folder: Path) -> Dtype | None:
    """The number format of the base in training; None where it was held in few bits, as the record says too."""
    base = read_record(folder).base
    if base.quantization is not None:
        return None
    return base.dtype if base.dtype in ("bfloat16", "float16") else "float32"  # type: ignore[return-value]


def _recorded_task(folder: Path) -> type[PEFTModule] | None:
    """The task of the user's own that the adapter was trained by; None where it was one of ours or is not known."""
    name = read_record(folder).task
    if name is None or name in tasks.__all__:
        return None
    kind = found(name, PEFTModule)
    if kind is None:
        raise unknown("task", name, PEFTModule)
    if options := own_names(kind):
        raise UserError(f"{kind.__name__} has options of its own ({listed(options)}), which the adapter's record does "
                        "not hold: give the configuration of its training, --config FILE.")  # fmt: skip
    return kind


def _precision_for(opened: Opened) -> str:
    dtype = next(p.dtype for p in opened.model.parameters() if p.is_floating_point())
    return default_precision(str(dtype).removeprefix("torch."), on_gpu=True)


def _task_of(opened: Opened) -> type[PEFTModule]:
    """The task of ours that is done with such a model."""
    kinds = [getattr(tasks, name) for name in tasks.__all__]
    known = {kind.auto_class: kind for kind in kinds if hasattr(kind, "auto_class")}
    if opened.auto_class not in known:
        raise UserError(f"The adapters are on an {opened.auto_class}; there are tasks for {listed(sorted(known))}.")
    return known[opened.auto_class]
