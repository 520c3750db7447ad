"""Images with a class each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from peftlight.data.encoder import Purpose
from peftlight.data.family import DataFamily
from peftlight.data.image_decoding import checked, decoded
from peftlight.data.image_folder import image_splits
from peftlight.data.image_rows import ImageRows, image_rows
from peftlight.data.image_transform import Transform, load_transform
from peftlight.data.labels import chosen_names
from peftlight.data.preparing import Preparation
from peftlight.data.sources import Split
from peftlight.data.summary import RowCounts
from peftlight.data.table import Table
from peftlight.errors import UserError, listed
from peftlight.files import cache_folder


@dataclass(eq=False, kw_only=True)
class Images(DataFamily):
    """Images from folders that are named like their classes, from files that list them, or from the hub."""

    column_names: ClassVar[tuple[str, ...]] = ("image", "label")
    made_for: ClassVar[str] = "ImageClassification"

    source: str
    """A folder of one folder for each class, or of such folders named train, validation and test; a file (json, jsonl,
    csv, tsv) with the columns image, a path as seen from that file, and label; a data set of the Hugging Face hub with
    a column of images, or its parquet files; or sample:shapes."""
    validation_source: str | None = None
    """A folder or file of its own for validation."""
    test_source: str | None = None
    """A folder or file of its own for testing."""
    predict_source: str | None = None
    """A folder, file or image to predict; otherwise the test split, or else the validation split."""
    labels: list[str] | None = None
    """The names of the labels in order; without it they are those found in the training split."""
    image_processor: Any = None
    """Name or folder of the image processor, which resizes, crops and normalises; by default that of the model."""
    image_size: int | None = None
    """Pixels along each side, with image_mean and image_std, where no image processor is to be used."""
    image_mean: list[float] | None = None
    """The mean of red, green and blue, where 1 is the brightest; it is subtracted."""
    image_std: list[float] | None = None
    """The standard deviation of red, green and blue, by which the rest is divided."""
    flip: bool = True
    """Whether half of the training images, another half each time, are mirrored from left to right."""

    def find_label_names(self, train: Callable[[], ImageRows]) -> list[str] | None:
        """The labels in order; `train` gives the training split where they have to be found."""
        return chosen_names(self.labels, train)

    def prepare(self, stage: str | None) -> "ImagePreparation":
        """The stage's splits as images that were seen to be readable."""
        module = self.trainer and self.trainer.lightning_module
        transform = load_transform(self.image_processor, self.image_size, self.image_mean, self.image_std, module)
        splits = self.find_splits(image_splits)
        return ImagePreparation(self, splits, transform, stage)

    def collator(self, role: str) -> Callable[[Any], dict[str, Any]]:
        """Stacks images of one size."""
        return stacked


@dataclass(frozen=True)
class ImageCounts(RowCounts):
    """Counts of one split's images."""

    classes: dict[str, int]
    """How many there are of each class; empty where they have no labels."""

    def __str__(self) -> str:
        each = listed((f"{count:,} {name}" for name, count in self.classes.items()), 20)
        return f"{self.rows:,} images" + (f" ({each})" if each else "")


class ImagePreparation(Preparation[ImageRows]):
    """The images of one stage."""

    data: Images

    def __init__(self, data: Images, splits: Mapping[str, Split], transform: Transform, stage: str | None) -> None:
        self._transform = transform
        self._tables: dict[str, list[Table]] = {}
        super().__init__(data, splits, stage)

    def read(self, name: str, purpose: Purpose) -> ImageRows:
        """All images, with their labels where they are asked for."""
        if name not in self._tables:
            self._tables[name] = self.splits[name].read()
        return image_rows(self._tables[name], purpose, self.data.columns, self.label_names)

    def summarize(self, name: str, content: ImageRows, rows: NDArray[np.int64]) -> ImageCounts:
        """Counts of images in each class."""
        names = content.label_names or []
        counts = [] if content.labels is None else np.bincount(content.labels[rows], minlength=len(names)).tolist()
        return ImageCounts(len(rows), len(rows), dict(zip(names, counts, strict=bool(counts))))

    def dataset(self, role: str, content: ImageRows, rows: NDArray[np.int64]) -> "ImageDataset":
        """Some images, of which those for training may be mirrored."""
        return ImageDataset(
            content, rows, self._transform, flip=role == "train" and self.data.flip, named=role == "predict"
        )

    def digest_of(self, name: str) -> str:
        """The sha256 of a split's content, the images included, all of which are seen to be readable."""
        images = self._content(name, "predict").images
        return checked(images, super().digest_of(name), cache_folder(self.data.cache_dir), name)


class ImageDataset(Dataset[dict[str, Any]]):
    """Some rows of images, each with its number in the source."""

    def __init__(
        self, images: ImageRows, rows: NDArray[np.int64], transform: Transform, flip: bool, named: bool
    ) -> None:
        self.images, self.rows, self.transform, self.flip, self.named = images, rows, transform, flip, named

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = int(self.rows[index])
        file = self.images.images[row]
        item: dict[str, Any] = {"pixel_values": self.transform(self._seen(decoded(file))), "row": row}
        if self.images.labels is not None:
            item["labels"] = int(self.images.labels[row])
        return {**item, "file": file.name} if self.named else item

    def _seen(self, image: Any) -> Any:
        if not self.flip or torch.rand(()) < 0.5:
            return image
        from PIL import ImageOps

        return ImageOps.mirror(image)


def stacked(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch: pixel_values (rows, channels, height, width), row (rows,), labels (rows,), and the list file."""
    shapes = sorted({tuple(item["pixel_values"].shape) for item in items})
    if len(shapes) > 1:
        raise UserError(f"The image processor leaves images of different sizes ({listed(shapes, 3)}), which make no "
                        "batch. Set data.image_size, data.image_mean and data.image_std.")  # fmt: skip
    batch: dict[str, Any] = {
        name: torch.tensor([item[name] for item in items]) for name in ("row", "labels") if name in items[0]
    }
    if "file" in items[0]:
        batch["file"] = [item["file"] for item in items]
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), **batch}
