"""Data sets of the Hugging Face hub, read with the package datasets when it is there."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from peftlight.data.reading import arrow_table
from peftlight.data.table import Table
from peftlight.errors import UserError, nearest

_LOCAL = "A local file works without the hub: --data.source path/to/train.jsonl (or .json, .csv, .tsv, .parquet)."


@dataclass(frozen=True, eq=False)
class HubPart:
    """One split of a hub data set."""

    name: str
    """Data set and split, for messages."""
    dataset: Any
    """The `datasets.Dataset`."""
    unit: str = "row"
    """What its rows are numbered by."""

    def digest(self) -> str:
        """The sha256 of the rows themselves."""
        import pyarrow as pa

        sink = _HashSink()
        table = self._arrow()
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), table.schema) as stream:
            stream.write_table(table)
        return sink.sha256.hexdigest()

    def read(self) -> Table:
        """The rows."""
        return arrow_table(self.name, self._arrow())

    def _arrow(self) -> Any:
        return self.dataset.with_format("arrow")[:]


class _HashSink:
    """A file that keeps only the hash of what is written to it."""

    closed = False

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing is open."""


def hub_parts(source: str, subset: str | None) -> dict[str, HubPart]:
    """The splits of a hub data set by the hub's names.

    Raises:
        UserError: datasets is not installed, the hub cannot be reached, or it has no such data set.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        needs = f"Reading {source!r} from the Hugging Face hub needs the package datasets: pip install datasets"
        raise UserError(f"{needs}\n{_LOCAL}") from error
    try:
        splits = load_dataset(source, subset)
    except Exception as error:  # the hub's client raises many unrelated kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        named = f"{source!r}" + (f" (subset {subset!r})" if subset else "")
        here = f"nor is there a local file or folder of that name.{nearest(source, os.listdir())}"
        message = f"Cannot load {named} from the Hugging Face hub ({reason}), {here}"
        raise UserError(f"{message}\n{_LOCAL}") from error
    return {name: HubPart(f"{source} ({name})", split) for name, split in splits.items()}
