"""metrics.csv of a run: all metrics by step, going on where a resumed run stands."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from peftlight.console import say
from peftlight.files import naming, write_atomically
from peftlight.resume.recorded import Lines
from peftlight.tasks import PEFTModule

NAME = "metrics.csv"


class MetricsFile(CSVLogger):
    """Lightning's CSVLogger, which never deletes what was written, and rewrites the file as a whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: the run's folder.
        """
        super().__init__(folder.parent, name="", version=folder.name)
        self.file = folder / NAME
        self._columns, self._rows = _head(self.file)
        self.last_step = -1
        """That of the last row."""

    @property
    def experiment(self) -> "MetricsFile":
        """What writes; Lightning's own writer deletes an earlier file."""
        return self

    @property
    def rows(self) -> int:
        """How many are in the file."""
        return self._rows

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Write a row; a metric that is new gets its column."""
        self.last_step = self._rows if step is None else step
        row = {**metrics, "step": self.last_step}
        gone = not self.file.exists()
        if gone and self._rows > 0:
            say(f"{self.file} is gone: it begins anew")
        if gone or row.keys() - set(self._columns):
            self._columns = sorted({*self._columns, *row})
            self._rewrite([*self._read(), row])
            return
        with naming(self.file), open(self.file, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self._rows += 1

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """They stand in the run's config.yaml."""

    @rank_zero_only
    def save(self) -> None:
        """Rows are written when they are logged."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """There is nothing to close."""

    def flush(self) -> None:
        """Have the disk hold all rows, for a checkpoint counts on them."""
        if self.file.exists():
            with naming(self.file), open(self.file, "rb") as file:
                os.fsync(file.fileno())

    @rank_zero_only
    def cut(self, rows: int) -> None:
        """Keep the first rows, and drop what was logged after them."""
        kept = [row for row in self._read()[:rows] if None not in row.values()]  # as of a line that a crash cut off
        if self._rows > 0:
            self._rewrite(kept)
        self.last_step = int(kept[-1]["step"]) if kept else -1

    def _read(self) -> list[dict[str, str]]:
        if not self.file.exists():
            return []
        with open(self.file, newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        def write(temporary: Path) -> None:
            with open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self._columns)
                writer.writeheader()
                writer.writerows(rows)

        write_atomically(self.file, write)
        self._rows = len(rows)


def _head(file: Path) -> tuple[list[str], int]:
    """The columns of the file, and how many rows it has; a last one that a crash cut off counts too."""
    if not file.exists():
        return [], 0
    with open(file, newline="", encoding="utf-8") as opened:
        lines = csv.reader(opened)
        return next(lines, []), sum(1 for _ in lines)


def lines_of(trainer: Trainer, module: PEFTModule) -> Lines:
    """How far metrics.csv is, for a checkpoint; what is in it is on the disk afterwards."""
    pending, file = _pending(trainer, module), _file_of(trainer)
    if file is None:
        return {"rows": 0, "pending": pending}
    file.flush()
    # Of a validation that was broken off, the step before is in the file already.
    return {"rows": file.rows, "pending": {} if file.last_step == pending.get("step") else pending}


def go_on(trainer: Trainer, lines: Lines) -> None:
    """Bring metrics.csv to where a checkpoint was written."""
    if (file := _file_of(trainer)) is None:
        return
    file.cut(lines["rows"])
    if lines["pending"]:
        file.log_metrics(lines["pending"], int(lines["pending"]["step"]))


def _file_of(trainer: Trainer) -> MetricsFile | None:
    return next((logger for logger in trainer.loggers if isinstance(logger, MetricsFile)), None)


def _pending(trainer: Trainer, module: PEFTModule) -> dict[str, float]:
    """The row of the step that was just done, if a callback saves before Lightning logs it; empty otherwise."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    done: Any = loop.batch_progress.current
    if done.processed == done.completed or loop._should_accumulate() or not connector.should_update_logs:
        return {}
    values: dict[str, Any] = {**connector.metrics["log"], **module.figures_due()}
    row = {name: float(value) for name, value in values.items()}
    return {**row, "epoch": trainer.current_epoch, "step": loop._batches_that_stepped}
