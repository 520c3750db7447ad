"""What is known of an adapter from its own files and those of the run that trained it."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar

import yaml
from safetensors import SafetensorError, safe_open

from peftlight.errors import UserError
from peftlight.interop.contents import Config
from peftlight.interop.folder import CONFIG, OF_RUN, find_adapter, read_record, tensor_file
from peftlight.interop.json_files import read_json
from peftlight.interop.metadata import Record
from peftlight.interop.own_format import TYPE_PREFIX
from peftlight.interop.tensor_files import PICKLE, read_tensors
from peftlight.typed import misfit

RUN, SETTINGS = "run.json", "config.yaml"
_MOST_VALUES = 100_000
"""A configuration has some hundreds."""
T = TypeVar("T")


class Rows(TypedDict, total=False):
    """What a split of the data is."""

    kept: int | None
    rows: int | None
    truncated: int | None
    tokens: int | None


class Moved(TypedDict):
    """A tensor of the audit."""

    moved: bool


class Audit(TypedDict):
    """What the audit of the training found."""

    trained: list[Moved]
    base_checksum: str


class Trained(TypedDict):
    """A row of the table of what trained."""

    modules: str
    count: int
    trained: str
    parameters: int


class Run(TypedDict, total=False):
    """What `run.json` holds, as far as it is read here."""

    state: str | None
    started: str | None
    training_seconds: float | None
    precision: str | None
    processes: int | None
    versions: dict[str, str | None] | None
    metrics: dict[str, float | None] | None
    data: dict[str, Rows] | None
    data_fingerprint: str | None
    audit: Audit | None
    trained: list[Trained] | None


class Section(TypedDict, total=False):
    """A class and its arguments."""

    class_path: str
    init_args: dict[str, Any] | None


class Settings(TypedDict, total=False):
    """What `config.yaml` holds, as far as it is read here."""

    model: Section | str | None
    data: Section | str | None
    trainer: dict[str, Any] | None
    optimizer: Any
    lr_scheduler: Any


@dataclass(frozen=True)
class RunFacts:
    """What the files say; of an adapter that stands alone, `run` and `settings` are empty."""

    config: Config
    record: Record
    parameters: int
    size: int
    """Bytes of the file of tensors."""
    run: Run = field(default_factory=Run)
    settings: Settings = field(default_factory=Settings)

    @property
    def read_by_peft(self) -> bool:
        return not str(self.config.get("peft_type")).startswith(TYPE_PREFIX)

    @property
    def method(self) -> str:
        """The name of the strategy, or what HF PEFT calls the adapter."""
        spec = self.record.trained_by or self.record.strategy
        kind = str(self.config.get("peft_type")).removeprefix(TYPE_PREFIX)
        return spec["class_path"].rpartition(".")[2] if spec else kind

    @property
    def metrics(self) -> dict[str, float]:
        """The finite values that were last logged, by name."""
        metrics = self.run.get("metrics") or self.record.metrics or {}
        return {name: value for name, value in sorted(metrics.items()) if value is not None and math.isfinite(value)}

    def settings_of(self, part: Literal["model", "data"]) -> Mapping[str, Any]:
        """The arguments of a class of the configuration."""
        found = self.settings.get(part)
        return (found.get("init_args") or {}) if isinstance(found, dict) else {}


def run_facts(folder: str | Path, convert_pickle: bool = False) -> RunFacts:
    """What is known of the adapter in `folder`, or in the run of that folder.

    Raises:
        UserError: there is no adapter, a file is damaged, or it is a pickle and `convert_pickle` is false.
    """
    try:
        folder = find_adapter(Path(folder))
        tensors = tensor_file(folder, convert_pickle)
    except UserError as error:
        raise UserError(f"Cannot read the adapter in {folder}: {error}") from None
    facts = RunFacts(read_json(folder / CONFIG), read_record(folder), _parameters(tensors), tensors.stat().st_size)
    run = folder.resolve().parent
    if folder.resolve().name != OF_RUN:
        return facts
    return dataclasses.replace(facts, run=_read(run / RUN, json.loads, Run), settings=read_settings(run / SETTINGS))


def read_settings(file: Path) -> Settings:
    """The configuration in a file; nothing where it is not there.

    Raises:
        UserError: it is damaged, or a part of it is of another kind.
    """
    return _read(file, _plain_yaml, Settings)


def _read(file: Path, parse: Callable[[str], Any], kind: type[T]) -> T:
    """What the file holds; nothing where it is not there."""
    try:
        content = parse(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}; expected keys and their values.")
    if wrong := misfit(content, kind):
        raise UserError(f"{file}: {wrong[0]} is {_start(content[wrong[0]])}; expected {wrong[1]}.")
    return content  # type: ignore[return-value]


def _plain_yaml(text: str) -> Any:
    """The content, unless what it repeats by reference would be without end when written out."""
    content = yaml.safe_load(text)
    if _values_in(content, {}) > _MOST_VALUES:
        raise ValueError(f"with what it repeats by reference it has more than {_MOST_VALUES} values")
    return content


def _values_in(content: Any, known: dict[int, int]) -> int:
    """How many values there are, each counted as often as it is referred to; RecursionError if it refers to itself."""
    if not isinstance(content, dict | list):
        return 1
    if id(content) not in known:
        inner = content.values() if isinstance(content, dict) else content
        known[id(content)] = 1 + sum(_values_in(value, known) for value in inner)
    return known[id(content)]


def _start(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) < 200 else f"{shown[:200]}..."


def _parameters(file: Path) -> int:
    if file.name == PICKLE:
        return sum(value.numel() for value in read_tensors(file).values())
    try:
        with safe_open(file, "numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
