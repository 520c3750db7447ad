"""What several parts of an evaluation ask of one batch, computed for the first of them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class PerBatch:
    """Keeps what was computed of one batch, while the block of `within` lasts; outside of one nothing is kept."""

    def __init__(self) -> None:
        self._batch: Mapping[str, Any] | None = None
        self._kept: dict[str, Any] = {}

    @contextmanager
    def within(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, what is asked of this very batch is computed once."""
        self._batch, self._kept = batch, {}
        try:
            yield
        finally:
            self._batch, self._kept = None, {}

    def of(self, name: str, batch: Mapping[str, Any], compute: Callable[[Mapping[str, Any]], T]) -> T:
        """`compute(batch)`, or what it gave before under this name; another batch is always computed."""
        if batch is not self._batch:
            return compute(batch)
        if name not in self._kept:
            self._kept[name] = compute(batch)
        value: T = self._kept[name]
        return value
