"""The folder of an adapter: which files there are, where they are looked for, and what they say."""

import os
from dataclasses import dataclass
from pathlib import Path

from peftlight.errors import UserError, listed, nearest
from peftlight.files import finish_writing
from peftlight.interop import metadata
from peftlight.interop.contents import Config, Tensors
from peftlight.interop.distrust import check_patterns
from peftlight.interop.json_files import read_json
from peftlight.interop.metadata import Record
from peftlight.interop.tensor_files import INDEX, PICKLE, TENSORS, read_tensors, sha256

CONFIG = "adapter_config.json"
OF_RUN = "adapter"
"""The adapter's folder in the folder of a run."""


@dataclass(frozen=True)
class Files:
    """What the files of one adapter hold."""

    config: Config
    tensors: Tensors
    record: Record


def read_files(folder: Path, convert_pickle: bool) -> Files:
    """The config, the tensors and the record of the adapter in `folder`, or in the run of that folder.

    Raises:
        UserError: a file is missing or damaged, or is a pickle and `convert_pickle` is false.
    """
    folder = find_adapter(folder)
    path = tensor_file(folder, convert_pickle)
    config, record = _config_and_record(folder)
    if record.sha256 is not None:
        metadata.check_sum(record, sha256(path), path.name)
    check_patterns(config)
    check_patterns({"strategy": record.strategy})
    return Files(config, read_tensors(path), record)


def read_record(folder: str | Path) -> Record:
    """What is recorded of the adapter in `folder`, or in the run of that folder: its base, data, metrics, versions.

    Of an adapter that HF PEFT wrote, it is the base's name and revision alone.

    Raises:
        UserError: there is no adapter, or its record is damaged.
    """
    try:
        return _config_and_record(find_adapter(Path(folder)))[1]
    except UserError as error:
        raise UserError(f"Cannot read the record of the adapter in {folder}: {error}") from None


def _config_and_record(folder: Path) -> tuple[Config, Record]:
    config = read_json(folder / CONFIG)
    if not (folder / metadata.FILE).exists():
        return config, metadata.record_of_peft(config)
    record = metadata.as_record(read_json(folder / metadata.FILE))
    if record.sha256 is None:
        raise UserError(f"{metadata.FILE} has no sha256 of {TENSORS}; it was damaged. Delete it to load without it.")
    return config, record


def find_adapter(folder: Path) -> Path:
    """The folder of the adapter's files: `folder` itself, or the one within the run of that folder.

    Raises:
        UserError: there is none, or there are several.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("It is a file; expected a folder.")
    if not folder.exists():
        beside = os.listdir(folder.parent) if folder.parent.is_dir() else []
        raise UserError(f"There is no such folder.{nearest(folder.name, beside)}")
    finish_writing(folder, (TENSORS, metadata.FILE, CONFIG))
    if (folder / CONFIG).is_file():
        return folder
    try:
        there = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UserError(f"It cannot be read: {error.strerror}.") from None
    inner = [name for name in there if (folder / name / CONFIG).is_file()]
    if inner == [OF_RUN]:
        return folder / OF_RUN
    if inner:
        raise UserError(f"It has no {CONFIG} itself, but has adapters in sub-folders: {listed(inner)}. Name one.")
    raise UserError(f"It has no {CONFIG}. What is there: {listed(there) or '-'}.")


def tensor_file(folder: Path, convert_pickle: bool) -> Path:
    """The file of tensors in an adapter's folder.

    Raises:
        UserError: there is none, or it is a pickle and `convert_pickle` is false.
    """
    if (folder / TENSORS).is_file():
        return folder / TENSORS
    missing = f"It has no {TENSORS} (safetensors)."
    if (folder / INDEX).exists():
        raise UserError(f"{missing} {INDEX} says that it is in several parts, which HF PEFT does not write: join them.")
    if not (folder / PICKLE).is_file():
        raise UserError(missing)
    if convert_pickle:
        return folder / PICKLE
    raise UserError(
        f"{missing} {PICKLE} is a pickle, which may run code. Save it again in HF PEFT with safe_serialization=True, "
        "or have it read for its tensors alone, running nothing: "
        "load_adapter(..., convert_pickle=True), or --convert_pickle true on the command line."
    )
