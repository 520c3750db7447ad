"""What is known of an adapter from its own files and those of the run that trained it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from peftlight.errors import UserError
from peftlight.interop.contents import Config
from peftlight.interop.folder import CONFIG, OF_RUN, find_adapter, read_record
from peftlight.interop.json_files import read_json
from peftlight.interop.metadata import Record
from peftlight.interop.own_format import TYPE_PREFIX
from peftlight.interop.tensor_files import TENSORS

RUN, SETTINGS = "run.json", "config.yaml"


@dataclass(frozen=True)
class RunFacts:
    """What the files say; of an adapter that stands alone, `run` and `settings` are empty."""

    config: Config
    record: Record
    run: Mapping[str, Any]
    """What `run.json` holds."""
    settings: Mapping[str, Any]
    """What `config.yaml` holds."""
    parameters: int
    size: int
    """Bytes of the file of tensors."""

    @property
    def read_by_peft(self) -> bool:
        return not str(self.config.get("peft_type")).startswith(TYPE_PREFIX)

    @property
    def method(self) -> str:
        """The name of the strategy, or what HF PEFT calls the adapter."""
        path = (self.record.trained_by or self.record.strategy or {}).get("class_path")
        kind = str(self.config.get("peft_type")).removeprefix(TYPE_PREFIX)
        return path.rpartition(".")[2] if isinstance(path, str) else kind

    @property
    def metrics(self) -> dict[str, float]:
        """The finite values that were last logged, by name."""
        metrics: Mapping[str, Any] = self.run.get("metrics") or self.record.metrics or {}
        return {name: metrics[name] for name in sorted(metrics) if _is_finite(metrics[name])}

    def settings_of(self, part: str) -> Mapping[str, Any]:
        """The arguments of a class of the configuration: "model", "data"."""
        found = self.settings.get(part)
        return (found.get("init_args") or {}) if isinstance(found, Mapping) else {}


def run_facts(folder: str | Path) -> RunFacts:
    """What is known of the adapter in `folder`, or in the run of that folder.

    Raises:
        UserError: there is no adapter, or a file is damaged.
    """
    folder = find_adapter(Path(folder))
    parameters = _parameters(folder / TENSORS)
    run, settings = _of_run(folder) if folder.resolve().name == OF_RUN else ({}, {})
    size = (folder / TENSORS).stat().st_size
    return RunFacts(read_json(folder / CONFIG), read_record(folder), run, settings, parameters, size)


def _of_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    found = []
    for name, read in ((RUN, json.loads), (SETTINGS, yaml.safe_load)):
        file = folder.resolve().parent / name
        try:
            content = read(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"{file} cannot be read: {error}.") from None
        found.append(content if isinstance(content, dict) else {})
    return found[0], found[1]


def _parameters(file: Path) -> int:
    try:
        with safe_open(file, "numpy") as tensors:
            return sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
