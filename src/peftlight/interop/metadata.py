"""`peftlight.json`: where an adapter comes from, and the checksum of its tensors."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from peftlight import __version__
from peftlight.errors import UserError
from peftlight.interop.hf_peft import base_name
from peftlight.strategy import Adapter, PEFTStrategy
from peftlight.strategy_spec import spec_of

FILE = "peftlight.json"
FORMAT = 1
"""Version of the files' format; a reader refuses a newer one."""


def describe(adapter: Adapter, recipe: PEFTStrategy, sha256: str) -> dict[str, Any]:
    """The origin of a finished adapter, trained by `recipe`, whose file of tensors has this checksum."""
    versions = {"peftlight": __version__, "torch": str(torch.__version__)}
    if "transformers" in sys.modules:
        versions["transformers"] = str(sys.modules["transformers"].__version__)
    return {
        "format": FORMAT,
        "base_model": base_name(adapter.model),
        "strategy": spec_of(adapter.strategy),
        "trained_by": spec_of(recipe),
        "trained": adapter.trained,
        "versions": versions,
        "sha256": sha256,
    }


def check(origin: dict[str, Any], sha256: str, file: str) -> None:
    """See that the file of tensors is the one that was saved with `origin`, in a format that is known.

    Raises:
        UserError: it is not.
    """
    version = origin.get("format")
    if not isinstance(version, int) or version > FORMAT:
        raise UserError(f"{FILE} says format {version!r}; this version of peftlight knows up to {FORMAT}.")
    if origin.get("sha256") != sha256:
        raise UserError(
            f"{file} is not the file that was saved: its checksum is not the one in {FILE}. It was damaged, or another "
            f"program replaced it; if that was on purpose, delete {FILE}."
        )


def as_json(value: dict[str, Any]) -> str:
    """The value as text, the same for the same value.

    Raises:
        UserError: it holds something that JSON cannot.
    """
    try:
        return json.dumps(value, indent=2, sort_keys=True) + "\n"
    except TypeError as error:
        raise UserError(
            f"The strategy's fields cannot be saved: {error}. Use numbers, text, lists and dicts."
        ) from None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{path.name} holds a {type(value).__name__}; expected a JSON object.")
    return value
