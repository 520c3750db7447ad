"""Tokens on the disk, found again by what they were made from."""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from peftlight.data.tokens import Tokens
from peftlight.errors import UserError
from peftlight.files import write_atomically
from peftlight.locks import alone

FORMAT = 2
"""Raised whenever the same inputs would give other tokens or another file."""

_ARRAYS = ("input_ids", "offsets", "lengths", "numbers", "files", "trained", "labels", "token_types",
           "words", "tags", "targets", "target_offsets", "target_lengths")  # fmt: skip
_METADATA = "peftlight"


def token_file(folder: Path, content: str, tokenizer: str, settings: Mapping[str, Any]) -> Path:
    """The file for rows with this hash of their content, a tokenizer with this identity, and these settings."""
    parts = json.dumps([FORMAT, content, tokenizer, settings], sort_keys=True)
    return folder / "tokens" / f"{hashlib.sha256(parts.encode()).hexdigest()}.safetensors"


def cached(path: Path, make: Callable[[], Tokens], describe: Callable[[Tokens], Mapping[str, Any]]) -> Tokens:
    """The tokens in the file; where it is absent or damaged, those of `make`, written with a description for people.

    Of several processes that need them one makes them; the others wait and read its file.
    """
    tokens = _whole(path)
    if tokens is not None:
        return tokens
    with alone(path):
        tokens = _whole(path)  # another may have made them meanwhile
        return _made(path, make, describe) if tokens is None else tokens


def _made(path: Path, make: Callable[[], Tokens], describe: Callable[[Tokens], Mapping[str, Any]]) -> Tokens:
    tokens = make()
    try:
        write_atomically(path, lambda file: _save(file, tokens, describe(tokens)))
    except UserError as error:
        raise UserError(f"{error} The folder for tokens is --data.cache_dir (or $PEFTLIGHT_CACHE).") from error
    return tokens


def _whole(path: Path) -> Tokens | None:
    """The tokens in the file; None where it is absent or damaged."""
    try:
        return _load(path) if path.exists() else None
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        rank_zero_warn(f"The cached tokens in {path} are damaged ({error}); they are made again.")
        return None


def _save(path: Path, tokens: Tokens, description: Mapping[str, Any]) -> None:
    arrays = {name: array for name in _ARRAYS if (array := getattr(tokens, name)) is not None}
    metadata = {
        "sha256": _digest(arrays),
        "label_names": tokens.label_names,
        "unlabelled": tokens.unlabelled,
        "findings": tokens.findings,
        "summary": description,
    }
    # As bytes: a full disk is then an OSError like everywhere else, which safetensors would hide in its own error.
    path.write_bytes(save(arrays, metadata={_METADATA: json.dumps(metadata)}))


def _load(path: Path) -> Tokens:
    with safe_open(path, framework="numpy") as file:
        metadata = json.loads(file.metadata()[_METADATA])
        names = file.keys()
        arrays = {name: file.get_tensor(name) for name in names}
    if _digest(arrays) != metadata["sha256"]:
        raise ValueError("its content has changed")
    told = {name: metadata[name] for name in ("label_names", "unlabelled", "findings")}
    return Tokens(**arrays, **told)


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    sha256 = hashlib.sha256()
    for name in sorted(arrays):
        sha256.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        sha256.update(np.ascontiguousarray(arrays[name]).data)
    return sha256.hexdigest()
