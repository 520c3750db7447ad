"""Decoding images with Pillow, and the check that all of them can be decoded."""

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from peftlight.data.bar import with_bar
from peftlight.data.image_rows import ImageFile
from peftlight.errors import UserError, listed
from peftlight.files import write_text
from peftlight.locks import alone

FORMAT = 1
"""Raised whenever other images would pass the check, or the same images would get another digest."""

_BATCH = 256
_THREADS = 4
_MOST_NAMED = 5


def decoded(image: ImageFile) -> Any:
    """The image as Pillow's, upright, with the three channels red, green and blue of 8 bits each.

    Raises:
        UserError: it is damaged, or has more than 8 bits for each channel.
    """
    try:
        return _decoded(image.content())
    except ValueError as error:
        raise UserError(f"{image.where}: the image cannot be decoded: {error}.") from error


def _decoded(content: bytes) -> Any:
    """Raises ValueError with the reason."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UserError("Reading images needs the package Pillow: pip install pillow") from error
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        image.load()
        image = ImageOps.exif_transpose(image)
    except Image.UnidentifiedImageError as error:
        raise ValueError("it is of no known format" if content else "it is empty") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); save it with 8 bits for each channel")
    return (image.convert("RGBA") if "transparency" in image.info else image).convert("RGB")


def checked(images: Sequence[ImageFile], digest: str, folder: Path, name: str) -> str:
    """The sha256 over `digest` and the content of all images, each of which is decoded once to see that it can be.

    The result is kept in `folder`, to be found again as long as no file changes its size or time.

    Raises:
        UserError: some cannot be decoded; the first of them are named.
    """
    files = [(str(image.path.resolve()), *_size_and_time(image.path)) for image in images if image.path]
    key = json.dumps([FORMAT, digest, len(images), files])
    kept = folder / "images" / f"{hashlib.sha256(key.encode()).hexdigest()}.sha256"
    if not kept.exists():
        with alone(kept):
            if not kept.exists():  # else another process checked them meanwhile
                write_text(kept, _check(images, digest, name))
    return kept.read_text(encoding="utf-8")


def _size_and_time(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _check(images: Sequence[ImageFile], digest: str, name: str) -> str:
    sha256, problems = hashlib.sha256(digest.encode()), []
    batches = [images[start : start + _BATCH] for start in range(0, len(images), _BATCH)]
    with ThreadPoolExecutor(_THREADS) as threads:
        for batch in with_bar(batches, len(images), f"Checking the images of {name}"):
            for own, problem in threads.map(_examined, batch):
                sha256.update(own)
                if problem:
                    problems.append(problem)
    if problems:
        raise UserError(f"{len(problems)} of {len(images)} images cannot be decoded; replace or remove them: "
                        f"{listed(problems, _MOST_NAMED)}.")  # fmt: skip
    return sha256.hexdigest()


def _examined(image: ImageFile) -> tuple[bytes, str]:
    """The hash of the encoded image, and what is wrong with it."""
    content = image.content()
    try:
        _decoded(content)
    except ValueError as error:
        return b"", f"{image.where}: {error}"
    return hashlib.sha256(content).digest(), ""
