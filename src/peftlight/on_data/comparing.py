"""The metrics of a base and of each of its adapters on the same rows."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from peftlight.errors import UserError
from peftlight.on_data.at_work import OnData

BASE = "base"
_SHARE = "accuracy"
"""The metric that is a share of right answers, so that their number says how sure it is."""


@dataclass(frozen=True)
class Row:
    """What was measured of one of them."""

    name: str
    strategy: str | None
    """None: the base."""
    parameters: int
    """How many numbers the adapter has."""
    metrics: Mapping[str, float] | None
    """None: the base has no head for the task, and what a random one says means nothing."""
    answers: int
    """How many labels were scored."""

    @property
    def error(self) -> float | None:
        """The standard error √(p (1 - p) / n) of the accuracy p on n answers; None without one."""
        share = (self.metrics or {}).get(_SHARE)
        return None if share is None or not self.answers else math.sqrt(share * (1 - share) / self.answers)


@dataclass(frozen=True)
class Comparison:
    """All rows, and what they were measured on."""

    data: Mapping[str, Any]
    """`class`, `source`, `split`, `fingerprint` (of the whole split), `limit`."""
    rows: list[Row]

    def table(self) -> Table:
        """A line for each; the counts of a confusion matrix are in the JSON alone."""
        names = next((list(row.metrics) for row in reversed(self.rows) if row.metrics), [])
        shown = [name for name in names if "_as_" not in name]
        title = "{class} {source}, {split}".format(**self.data)
        table = Table(title=title, title_justify="left")
        for column in ("", "method", "parameters", *shown):
            table.add_column(column, justify="left" if column in ("", "method") else "right", overflow="fold")
        for row in self.rows:
            values = [_cell(row, name) for name in shown]
            table.add_row(row.name, row.strategy or "-", f"{row.parameters:,}", *values)
        return table

    def notes(self) -> Iterator[str]:
        """What the table's figures mean where that is not plain."""
        if any(row.metrics is None for row in self.rows):
            yield "The base has no trained head for this task: there is nothing to measure without an adapter."
        if any(row.error is not None for row in self.rows):
            yield f"±: one standard error, √(p(1-p)/n), of n = {self.rows[-1].answers:,} answers."

    def as_json(self) -> str:
        """All figures."""
        rows = [{**asdict(row), f"{_SHARE}_error": row.error} for row in self.rows]
        return json.dumps({"data": dict(self.data), "rows": rows}, indent=2) + "\n"


def compare(on: OnData, split: Literal["validation", "test"], limit: int | None) -> Comparison:
    """Measure the base and each adapter by the metrics that its task logs when Lightning validates or tests it.

    Raises:
        UserError: the data cannot be read, or an adapter does not fit it.
    """
    size, kind = getattr(on.data, "batch_size", None), type(on.data).__name__
    if limit is not None and size is None:
        raise UserError(f"--limit counts rows, and {kind} has no attribute batch_size to tell how many a batch has.")
    batches = None if limit is None or size is None else math.ceil(limit / size)
    rows = [_measured(on, name, split, batches) for name in (None, *on.opened.adapters.names)]
    if split == "test" and getattr(on.data, "tests_on_validation", False):
        raise _without_rows(getattr(on.data, "source", kind), split)
    data = {
        "class": kind, "source": getattr(on.data, "source", None), "split": split,
        "fingerprint": getattr(on.data, "fingerprint", None), "limit": limit,
    }  # fmt: skip
    return Comparison(data, rows)


def _measured(on: OnData, name: str | None, split: Literal["validation", "test"], batches: int | None) -> Row:
    if name is None and on.opened.new:
        return Row(BASE, None, 0, None, 0)
    module, answers = on.module(name), _Answers()
    trainer = on.trainer([_HasRows(split), answers], limit_val_batches=batches, limit_test_batches=batches)
    run = trainer.validate if split == "validation" else trainer.test
    run(module, datamodule=on.data, verbose=False)
    prefix = "val_" if split == "validation" else "test_"
    metrics = {key.removeprefix(prefix): float(value) for key, value in trainer.callback_metrics.items()}
    if name is None:
        return Row(BASE, None, 0, metrics, answers.count)
    adapter = on.opened.adapters[name]
    parameters = sum(value.numel() for value in adapter.parameters().values())
    return Row(name, type(adapter.strategy).__name__, parameters, metrics, answers.count)


def _without_rows(source: str, split: str) -> UserError:
    other = ", or compare on the validation rows: --split validation" if split == "test" else ""
    return UserError(f"{source} has no {split} rows with answers. Give them with --source FILE{other}")


class _HasRows(Callback):
    """Says which option of the command gives rows, once the data is read; the data itself knows those of `fit`."""

    def __init__(self, split: str) -> None:
        self.split = split

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if self.split not in getattr(data, "summaries", {self.split}):  # data of a user's own counts no rows
            raise _without_rows(data.source, self.split)


class _Answers(Callback):
    """Counts what is scored: labels below 0 are not."""

    count = 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self.count += int((batch["labels"] >= 0).sum())

    on_test_batch_end = on_validation_batch_end


def _cell(row: Row, metric: str) -> str:
    if row.metrics is None:
        return "-"
    value = row.metrics[metric]
    return f"{value:.4f} ± {row.error:.4f}" if metric == _SHARE and row.error is not None else f"{value:.4g}"
