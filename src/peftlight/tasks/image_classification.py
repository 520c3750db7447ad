"""Image classification: one class for each image."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from peftlight.errors import UserError
from peftlight.pretrained import Source
from peftlight.tasks.classifier import Classifier
from peftlight.tasks.columns import reads_columns


class ImageClassification(Classifier):
    """One class for each image; logs loss, accuracy and macro F1."""

    auto_class = "AutoModelForImageClassification"

    def load_image_processor(self, name: str | None = None) -> Any:
        """The base model's own image processor, or that of another model, as `load_tokenizer` takes them."""
        if name is not None:
            return Source(name).load_image_processor()
        if self.source is None:
            raise UserError(
                "The base model was given as an object, so its image processor is unknown: set data.image_processor, "
                "or data.image_size, data.image_mean and data.image_std."
            )
        return self.source.load_image_processor()

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model reads: pixel_values (rows, channels, height, width)."""
        return {"pixel_values": batch["pixel_values"]}

    def logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The scores (rows, classes)."""
        try:
            return super().logits(batch)
        except ValueError as error:  # a model that takes one size only refuses another
            height, width = batch["pixel_values"].shape[-2:]
            raise UserError(
                f"{self._base_name()} refuses images of {height} x {width} pixels: {error} "
                "Set data.image_size, or choose another data.image_processor."
            ) from error

    @reads_columns
    def predict_step(self, batch: Mapping[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """One record for each image: its id, its file, the label, the label's probability, and all probabilities."""
        records = self.records(batch)
        return [{**record, "file": file} for record, file in zip(records, batch["file"], strict=True)]
