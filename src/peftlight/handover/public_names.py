"""Which names mean the same on every machine: those of the hub and of packages. A path does not."""

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FILES = {".bin", ".csv", ".gguf", ".json", ".jsonl", ".parquet", ".safetensors", ".tsv", ".txt"}
_SHIPPED = ("pypi:", "sample:")
"""Beginnings of names for what a package carries."""


def is_hub_id(name: str) -> bool:
    """Whether the name has the form of a hub repository's, and is not that of a file or folder here."""
    plain = _HUB_ID.fullmatch(name) is not None and Path(name).suffix.lower() not in _FILES
    return plain and not Path(name).exists()


def is_public(name: str) -> bool:
    """Whether others find the same under the name."""
    return is_hub_id(name) or name.startswith(_SHIPPED)


def without_folders(value: Any) -> Any:
    """The plain data, with every absolute path in it cut to its last part."""
    if isinstance(value, Mapping):
        return {key: without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return last_part(value) if isinstance(value, str) and _is_absolute(value) else value


def last_part(name: str) -> str:
    """What stands after the last slash of a path."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _is_absolute(text: str) -> bool:
    return len(text) > 1 and (text.startswith(("/", "~/")) or PureWindowsPath(text).is_absolute())
