"""Which names mean the same on every machine: those of the hub and of packages. A path does not."""

import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_FILES = {".bin", ".csv", ".gguf", ".json", ".jsonl", ".parquet", ".safetensors", ".tsv", ".txt"}
_SHIPPED = ("pypi:", "sample:")
"""Beginnings of names for what a package carries."""
_NAMES = {"base_model_name_or_path", "name", "name_or_path", "source", "tokenizer", "tokenizer_name_or_path"}
"""Fields that say where something comes from: there a path may be relative too."""
_PATH = re.compile(r"file://\S+|(?<![\w./])(?:/(?!/)|~/|[A-Za-z]:\\)[^\s\"'`<>()\[\]{}|,;]+")
_SOMEBODYS = re.compile(r"(/home/|/Users/|/root/|file://|[A-Za-z]:\\)")
_EVERYWHERE = ("/bin/", "/dev/", "/etc/", "/proc/", "/sys/", "/usr/")


def is_hub_id(name: str) -> bool:
    """Whether the name has the form of a hub repository's, and is not that of a file or folder here."""
    plain = _HUB_ID.fullmatch(name) is not None and Path(name).suffix.lower() not in _FILES
    return plain and not Path(name).exists()


def is_public(name: str) -> bool:
    """Whether others find the same under the name."""
    return is_hub_id(name) or name.startswith(_SHIPPED)


def without_folders(value: Any) -> Any:
    """The plain data, with every path in it cut to its last part: what is absolute, and what names a thing here."""
    if isinstance(value, Mapping):
        return {key: _named(item) if key in _NAMES else without_folders(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(item) for item in value]
    return last_part(value) if isinstance(value, str) and _is_absolute(value) else value


def paths_in(text: str) -> list[str]:
    """The paths of this machine, and those below anyone's home, that a text holds."""
    found = dict.fromkeys(match[0].rstrip(".:") for match in _PATH.finditer(text))
    return [path for path in found if _SOMEBODYS.match(path) or _is_here(path)]


def _is_here(path: str) -> bool:
    """Whether it is a path of this machine, and one that other machines do not have as well."""
    try:
        return path.count("/") > 1 and not path.startswith(_EVERYWHERE) and Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False


def _named(value: Any) -> Any:
    """What the field of a name says, if others know it by that name; else its last part."""
    return last_part(value) if isinstance(value, str) and not is_public(value) else without_folders(value)


def last_part(name: str) -> str:
    """What stands after the last slash of a path."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def _is_absolute(text: str) -> bool:
    return len(text) > 1 and (text.startswith(("/", "~/", "file:")) or PureWindowsPath(text).is_absolute())
