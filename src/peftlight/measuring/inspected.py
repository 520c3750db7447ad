"""What `peftlight inspect` shows."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from peftlight.interop.folder import read_files
from peftlight.interop.hf.names import without_prefix
from peftlight.interop.run_facts import RunFacts
from peftlight.measuring.measured import Measured, together, total_norm, total_relative
from peftlight.measuring.tables import table_of_facts, table_of_figures
from peftlight.paths import place_of

_NOT_OF_METHOD = {"base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision", "task_type"}
"""Fields of HF PEFT's config that are no hyperparameters."""


def facts_of(facts: RunFacts) -> Table:
    """The adapter's record and that of its run."""
    return table_of_facts(facts.method, _facts(facts))


def changes_by(title: str, by: Callable[[Any], str], rows: Sequence[Measured]) -> Table:
    """The rows in groups: their norms together, and the means of their ranks."""
    norm = "‖ΔW‖" if any(row.base for row in rows) else "norm"
    columns = ("", "n", "values", norm, "/ ‖W‖", "rank", "effective")
    groups = together(rows, by)
    return table_of_figures(title, columns, [_group(name, group) for name, group in groups.items()])


def in_file(folder: Path, convert_pickle: bool = False) -> list[Measured]:
    """The tensors as they are in the file, layer after layer, where there is no base to put them on."""
    rows = []
    for key, value in read_files(folder, convert_pickle).tensors.items():
        name = without_prefix(key)
        rows.append(Measured(name, "file", list(value.shape), value.numel(), float(value.double().norm())))
    return sorted(rows, key=lambda row: place_of(row.name) or ("", 0))


def as_json(adapter: str, facts: RunFacts, rows: Sequence[Measured]) -> str:
    """All figures, as data."""
    found = {
        "adapter": adapter,
        "method": facts.method,
        "bytes": facts.size,
        "values": facts.parameters,
        "record": dataclasses.asdict(facts.record),
        "run": {name: facts.run.get(name) for name in ("state", "started", "training_seconds", "versions")},
        "tensors": [{**dataclasses.asdict(row), "relative": row.relative} for row in rows],
    }
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


def _group(name: str, rows: Sequence[Measured]) -> tuple[object, ...]:
    ranks = [(row.rank, row.effective_rank) for row in rows if row.rank is not None and row.effective_rank is not None]
    return (
        f"{name} (new)" if {row.how for row in rows} == {"new"} else name,
        len(rows),
        sum(row.parameters for row in rows),
        total_norm(rows),
        total_relative(rows),
        fmean(rank for rank, _ in ranks) if ranks else None,
        fmean(effective for _, effective in ranks) if ranks else None,
    )


def _facts(facts: RunFacts) -> Iterator[tuple[str, str]]:
    record, run, base = facts.record, facts.run, facts.record.base
    yield "method", _recipe(facts)
    yield "format", "HF PEFT's" if facts.read_by_peft else "peftlight's own"
    yield "size", f"{facts.parameters:,} values in {facts.size:,} bytes"
    versions = run.get("versions") or record.versions or {}
    known = {
        "base": f"{base.name} at {base.revision}" if base.revision else base.name,
        "number format": base.dtype,
        "task": record.task or base.auto_class,
        "defined in": ", ".join(f"{path}: {file}" for path, file in (record.defined_in or {}).items()),
        "classes": ", ".join(record.label_names or ()),
        "data": " ".join(str(value) for name, value in (record.data or {}).items()
                         if name in ("source", "fingerprint") and value),
        "steps": record.steps,
        "seed": record.seed,
        "metrics": _pairs(facts.metrics),
        "training": run.get("state"),
        "began": run.get("started"),
        "seconds": run.get("training_seconds"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }  # fmt: skip
    yield from ((name, str(value)) for name, value in known.items() if value not in (None, ""))


def _recipe(facts: RunFacts) -> str:
    """The method with its hyperparameters, those left out that say nothing."""
    spec = facts.record.trained_by or facts.record.strategy
    settings = dict(spec["init_args"]) if spec else {k: v for k, v in facts.config.items() if k not in _NOT_OF_METHOD}
    said = {name: value for name, value in settings.items() if value not in (None, False, [], {}, "")}
    return ", ".join([facts.method, *(f"{name} {_word(value)}" for name, value in said.items())])


def _word(value: Any) -> str:
    """A setting; of a strategy within it, the class's own name."""
    if isinstance(value, list):
        return " ".join(map(_word, value))
    return (
        str(value["class_path"]).rpartition(".")[2] if isinstance(value, dict) and "class_path" in value else str(value)
    )


def _pairs(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())
