"""Run by torchrun in each of two processes: a user's own loaders, whose rows do not go round."""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")

import torch  # noqa: E402
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402

from models import make  # noqa: E402
from peftlight.strategies import LoRA  # noqa: E402
from peftlight.tasks import SequenceClassification  # noqa: E402
from tasks.small import class_rows, constant, padded, quiet_trainer, standing_still  # noqa: E402

ROWS = class_rows([5, 12, 3, 9, 17, 2, 8, 9, 4], [0, 2, 1, 1, 0, 2, 0, 2, 1])


class Own(LightningDataModule):
    """Loaders that know of no other process; with `uneven`, each gives another number of batches."""

    def __init__(self, sizes: list[tuple[int, int]], uneven: bool = False, drop_last: bool = False) -> None:
        super().__init__()
        self.sizes, self.uneven, self.drop_last = sizes, uneven, drop_last

    def train_dataloader(self) -> DataLoader[Any]:
        if self.uneven:
            rank = self.trainer.global_rank if self.trainer else 0
            return DataLoader(Stream(3 + 2 * rank), batch_size=1, collate_fn=padded)
        return DataLoader(ROWS, batch_size=2, collate_fn=padded)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return [DataLoader(ROWS[:rows], size, collate_fn=padded, drop_last=self.drop_last, shuffle=rows == 8)
                for rows, size in self.sizes]  # fmt: skip


class Stream(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS[: self.count])


class Noting(Callback):
    """Writes down the error that ends the training, before the processes are ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        (self.folder / f"ended_{trainer.global_rank}.txt").write_text(str(exception))


SIZES = {"one loader": [(9, 2)], "two loaders": [(9, 2), (3, 1)], "one row": [(1, 2)], "as many": [(8, 2)]}


def task(**options: Any) -> SequenceClassification:
    return SequenceClassification(make("bert"), LoRA(rank=2), num_labels=3, optimizer=standing_still, **options)


def metrics(folder: Path, **options: Any) -> dict[str, dict[str, float]]:
    """Those of an evaluation, and of the one in a training that moves nothing."""
    found = {}
    for name, sizes in SIZES.items():
        for fits in (False, True):
            trainer = quiet_trainer(folder, **options)
            if fits:
                trainer.fit(task(), Own(sizes))
            else:
                trainer.validate(task(), Own(sizes), verbose=False)
            values = {key: float(value) for key, value in trainer.callback_metrics.items()}
            found[f"{name} {fits}"] = {key: value for key, value in values.items() if key.startswith("val_")}
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.manual_seed(int(os.environ["RANK"]))  # as far apart as dropout brings them
    told: list[str] = []
    listener = logging.Handler()
    listener.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lightning.pytorch").addHandler(listener)
    found: dict[str, Any] = {"metrics": metrics(folder, strategy="ddp", devices=2), "told": told}
    (folder / f"own_{os.environ['RANK']}.json").write_text(json.dumps(found))
    noting = Noting(folder)
    uneven = task(lr_scheduler=constant)  # which plans by no number of steps: a stream has none
    quiet_trainer(folder, [noting], strategy="ddp", devices=2).fit(uneven, Own([(8, 2)], uneven=True))
