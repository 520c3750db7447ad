"""Predictions: written to a file by `predict`, or shown for a few texts when a fit ends."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.table import Table

from peftlight.console import say
from peftlight.errors import UserError, listed
from peftlight.files import write_text
from peftlight.gather import gathered
from peftlight.tasks import PEFTModule, TaskCallback


class PredictionWriter(Callback):
    """Writes what `predict_step` returns to `predictions.jsonl`: one JSON object a line, in the order of the rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._records: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self._records.extend(outputs)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = [record for part in gathered(self._records) for record in part]
        records = {record["id"]: record for record in every}
        self._records = []
        if len(records) < len(every):
            twice = [row for row, count in Counter(record["id"] for record in every).items() if count > 1]
            raise UserError(f"Several rows to predict have the same number in the column 'row', as {listed(twice, 4)}: "
                            "each needs one of its own, or their predictions could not be told apart.")  # fmt: skip
        if trainer.is_global_zero:
            path = self.folder / "predictions.jsonl"
            write_text(path, as_lines(records[row] for row in sorted(records)))
            say(f"{len(records)} predictions: {path}")


def as_lines(records: Iterable[Mapping[str, Any]]) -> str:
    """One JSON object a line."""
    return "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)


class ShowPredictions(TaskCallback):
    """Prints the model's predictions for a few texts when a fit ends."""

    def __init__(self, texts: list[str]) -> None:
        """
        Args:
            texts: what to predict.
        """
        self.texts = texts

    def after_training(self, trainer: Trainer, module: PEFTModule) -> None:
        tokenizer = module.tokenizer()
        modes = {each: each.training for each in module.modules()}
        module.eval()
        records: list[dict[str, Any]] = []
        with torch.inference_mode(), trainer.precision_plugin.predict_step_context():
            for number, text in enumerate(self.texts):  # one by one: nothing to pad at the right or wrong side
                batch = dict(tokenizer(text, return_tensors="pt", truncation=True).to(module.device))
                records += module.predict_step({**batch, "row": torch.tensor([number])}, 0)
        for each, training in modes.items():
            each.training = training
        table = Table(title="predictions", title_justify="left")
        columns = [key for key in records[0] if key in ("label", "probability", "completion", "generated")]
        for name in ("text", *columns):
            table.add_column(name)
        for text, record in zip(self.texts, records, strict=True):
            table.add_row(text, *(_cell(record[key]) for key in columns))
        say(table)


def _cell(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)
