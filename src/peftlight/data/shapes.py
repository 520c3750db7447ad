"""The sample of images: small coloured shapes, drawn when they are asked for, the same on every machine."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftlight.data.table import Table

SIZE, COUNT = 32, 360
"""Pixels along each side, and the number of images."""

_NAMES = ("circle", "square", "triangle")


@dataclass(frozen=True)
class ShapesPart:
    """Circles, squares and triangles in turn, of any size and place on a dark ground.

    Circles are mostly red, squares green and triangles blue, so that even a tiny model that was never trained before
    learns to tell them apart within two epochs.
    """

    name: str = "sample:shapes"
    """What messages call it."""
    unit: str = "row"
    """What its rows are numbered by."""

    def digest(self) -> str:
        """The sha256 of the images."""
        return hashlib.sha256(b"".join(_drawn())).hexdigest()

    def read(self) -> Table:
        """The images and the names of their shapes."""
        labels = [_NAMES[number % len(_NAMES)] for number in range(COUNT)]
        images = [
            {"bytes": image, "path": f"{label}-{number:03}.ppm"}
            for number, (label, image) in enumerate(zip(labels, _drawn(), strict=True))
        ]
        columns: dict[str, list[object]] = {"image": [*images], "label": [*labels]}
        return Table(self.name, self.unit, list(columns), range(1, COUNT + 1), columns.__getitem__)


def _drawn() -> list[bytes]:
    """The images in the format PPM, which is the bare pixels after a line."""
    random = np.random.default_rng(0)
    return [f"P6 {SIZE} {SIZE} 255\n".encode() + _image(number % len(_NAMES), random) for number in range(COUNT)]


def _image(kind: int, random: np.random.Generator) -> bytes:
    radius = random.uniform(6, 11)
    row, column = random.uniform(radius, SIZE - radius, 2)
    y, x = np.mgrid[:SIZE, :SIZE]
    inside = _inside(kind, (y - row) / radius, (x - column) / radius)
    colour = random.integers(0, 110, 3)
    colour[kind] = random.integers(170, 256)
    pixels = np.where(inside[..., None], colour, random.integers(0, 60, 3))
    noisy = pixels + random.integers(-10, 11, pixels.shape)
    return noisy.clip(0, 255).astype(np.uint8).tobytes()


def _inside(kind: int, y: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which points lie in the shape that reaches from -1 to 1."""
    if kind == 0:
        return y**2 + x**2 <= 1
    if kind == 1:
        return np.maximum(abs(y), abs(x)) <= 0.85
    return (abs(y) <= 1) & (abs(x) <= (y + 1) / 2)
