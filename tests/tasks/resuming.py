"""One training, undisturbed or taken up from a checkpoint, with everything noted that must not differ."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from torch.utils.data import DataLoader

from models import make
from peftlight.data.batching import Collator
from peftlight.data.family import DataFamily
from peftlight.strategies import LoRA
from peftlight.strategy import PEFTStrategy
from peftlight.tasks import PEFTModule, SequenceClassification
from tasks.small import class_rows, padded, quiet_trainer

ROWS = class_rows([5, 12, 3, 9, 17, 2, 8, 9, 4, 6, 11, 7, 3, 5], [0, 2, 1, 1, 0, 2, 0, 2, 1, 1, 0, 2, 1, 0])


class Ours(DataFamily):
    """A family of data with these rows."""

    def prepare(self, stage: str | None) -> Any:
        arrays = [{**row, "input_ids": row["input_ids"].numpy()} for row in ROWS]
        rows: dict[str, Any] = {"train": arrays, "validation": arrays[:5]}
        return SimpleNamespace(datasets=rows, notices=[], findings=[], summaries={}, label_names=None, fingerprint="")

    def collator(self, role: str) -> Any:
        return Collator(pad_id=0)


class Uneven(Ours):
    """Rows that do not go round: 13 to train on, 5 to validate on."""

    def prepare(self, stage: str | None) -> Any:
        prepared = super().prepare(stage)
        prepared.datasets["train"] = prepared.datasets["train"][:13]
        return prepared


class Theirs(LightningDataModule):
    """A user's own: a DataLoader that knows nothing of us."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def train_dataloader(self) -> DataLoader[Any]:
        seed = self.options.get("generator")
        generator = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
        return DataLoader(ROWS, 3, shuffle=True, collate_fn=padded, **{**self.options, **generator})

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(ROWS[:5], 3, collate_fn=padded)


@dataclass
class Note(Callback):
    """All that a training did: rows of batches, validations, and what was logged when."""

    events: list[Any] = field(default_factory=list)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.events.append(("rows", trainer.current_epoch, batch_idx, batch["row"].tolist()))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.events.append(("epoch", trainer.current_epoch))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self.events.append(("validation", trainer.global_step))


class NotedLogger(Logger):
    """Adds what it is given to the notes, without what depends on time."""

    name = version = "noted"

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They are the same."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.note.events.append(("logged", step, {k: v for k, v in metrics.items() if k != "tokens_per_second"}))


class SaveEverywhere(Checkpoint):
    """Saves a checkpoint at each moment at which a callback may, and notes what had happened by then."""

    def __init__(self, folder: Path, note: Note) -> None:
        self.folder, self.note = folder, note
        self.saved: dict[str, int] = {}

    def _save(self, trainer: Trainer, moment: str) -> None:
        name = f"{len(self.saved):02}_{moment}"
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")
        self.saved[name] = len(self.note.events)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._save(trainer, "batch_end")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation_end")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, "epoch_end")


@dataclass
class Result:
    """What a training came to."""

    trained: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    schedules: list[dict[str, Any]]
    random: list[Any]
    events: list[Any]


def train(
    folder: Path,
    resumed: Path | None = None,
    data: Callable[[], LightningDataModule] = lambda: Ours(source="", batch_size=3),
    strategy: Callable[[], PEFTStrategy] = lambda: LoRA(rank=2, dropout=0.2),
    module: Callable[[PEFTStrategy], PEFTModule] = lambda strategy: SequenceClassification(make("bert", 0.1), strategy),
    callbacks: Sequence[Callback] | Callable[[], Sequence[Callback]] = (),
    save: Path | None = None,
    trainer_strategy: str = "auto",
    **options: Any,
) -> tuple[Result, dict[str, int]]:
    """Train, and say what came out; with `save`, also how many events each checkpoint there came after."""
    seed = 1 if resumed is None else 99  # the checkpoint has to bring its own
    model = module(strategy())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    note = Note()
    saver = [SaveEverywhere(save, note)] if save else []
    settings: dict[str, Any] = {"max_epochs": 2, "logger": NotedLogger(note), "enable_checkpointing": bool(saver),
                                "strategy": trainer_strategy, **options}  # fmt: skip
    trainer = quiet_trainer(folder, [note, *(callbacks() if callable(callbacks) else callbacks), *saver], **settings)
    trainer.fit(model, data(), ckpt_path=resumed, weights_only=True)
    assert model.adapter is not None
    state = [random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()]
    trained = {name: tensor.clone() for name, tensor in model.adapter.state().items()}
    optimizer = trainer.optimizers[0].state_dict()
    schedules = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    return Result(trained, optimizer, schedules, state, note.events), saver[0].saved if saver else {}


def train_uneven(folder: Path, batch_size: int, **options: Any) -> Result:
    """Train on rows that do not go round, with nothing random but their order."""
    dry: dict[str, Any] = {"strategy": lambda: LoRA(rank=2), "data": lambda: Uneven(source="", batch_size=batch_size)}
    return train(folder, module=lambda strategy: SequenceClassification(make("bert"), strategy), **dry, **options)[0]


def same(one: Any, other: Any) -> bool:
    """Whether two nested values are the same bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
