"""From a decoded image to the numbers that a model takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from peftlight.data.tokenizer import is_model_source
from peftlight.errors import UserError

Transform = Callable[[Any], Tensor]
"""An image of Pillow's to a tensor (channels, height, width)."""


@dataclass(frozen=True)
class Plain:
    """Resized to a square, scaled to the range 0 to 1, then normalised for each channel."""

    size: int
    """Pixels along each side."""
    mean: Sequence[float]
    """Taken from each channel, where 1 is the brightest."""
    std: Sequence[float]
    """What the rest is divided by."""

    def __call__(self, image: Any) -> Tensor:
        from PIL import Image

        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR), np.float32) / 255
        normal = (pixels - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))


@dataclass(frozen=True)
class Processed:
    """What the image processor of a model from transformers does: resizing, cropping, scaling, normalising."""

    processor: Any
    """The image processor."""

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels


def load_transform(given: Any, size: int | None, mean: list[float] | None, std: list[float] | None,
                   module: Any) -> Transform:  # fmt: skip
    """The plain one of that size, or that of the image processor given, or that of the model which `module` trains.

    Raises:
        UserError: there is no such image processor, or size, mean and std do not make a transform.
    """
    if size is not None or mean is not None or std is not None:
        return _plain(given, size, mean, std)
    if given is None:
        given = _of_model(module)
    return Processed(_by_name(given, module) if isinstance(given, str) else given)


def _plain(given: Any, size: int | None, mean: list[float] | None, std: list[float] | None) -> Plain:
    if given is not None:
        raise UserError("Give image_processor, or image_size, image_mean and image_std, but not both.")
    if size is None or mean is None or std is None:
        fields = {"image_size": size, "image_mean": mean, "image_std": std}
        missing = ", ".join(name for name, value in fields.items() if value is None)
        raise UserError(f"image_size, image_mean and image_std take the place of the model's image processor together; "
                        f"{missing} is missing.")  # fmt: skip
    if size < 1:
        raise UserError(f"image_size is the number of pixels along each side, at least 1; it is {size}.")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise UserError(f"image_mean and image_std are three numbers each, for red, green and blue, those of "
                        f"image_std above 0; found {mean} and {std}.")  # fmt: skip
    return Plain(size, tuple(mean), tuple(std))


def _of_model(module: Any) -> Any:
    if module is None:
        raise UserError(
            "There is no model to take the image processor from: set data.image_processor to a name or folder, or set "
            "data.image_size, data.image_mean and data.image_std."
        )
    if not hasattr(module, "load_image_processor"):
        raise UserError(f"{type(module).__name__} takes no images; choose --model ImageClassification.")
    return module.load_image_processor()


def _by_name(name: str, module: Any) -> Any:
    from transformers import AutoImageProcessor

    if is_model_source(name) and hasattr(module, "load_image_processor"):
        return module.load_image_processor(name)
    try:
        return AutoImageProcessor.from_pretrained(name, backend="pil")
    except Exception as error:  # transformers raises many unrelated kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"Cannot load the image processor {name!r}: {reason}") from error
