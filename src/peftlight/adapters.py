"""Several adapters on one base: loaded by name, switched without reloading, or one for each row of a batch."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from peftlight.combine import Combination, combine
from peftlight.errors import UserError, listed, nearest
from peftlight.interop import load_adapter
from peftlight.rows import by_rows
from peftlight.strategy import Adapter, PEFTStrategy, attach
from peftlight.turns import turn
from peftlight.wrappers import plain_model

_OPTIONS: dict[str, Any] = {"keep_base": True, "own_heads": True}
"""With these an adapter can be switched off, whatever it trains."""


class Adapters:
    """The adapters of one base model by name, each of any strategy.

    The base is frozen, and a new adapter is off: `use` chooses what the model computes with, `train` what trains.

    All threads share the model and what is on. Several threads that compute with different adapters do so within
    `using` or `rows`, which wait for each other. What would give a wrong result is an error instead, in one of the
    threads: switching while another one computes, computing within another one's block, and computing after another
    one has switched what this one had chosen. Threads that only compute need nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = plain_model(model).requires_grad_(False)
        self._adapters: dict[str, Adapter] = {}

    def load(self, folder: str | Path, name: str, **options: Any) -> Adapter:
        """Put the adapter in `folder` on the base under `name`; `options` are those of `load_adapter`.

        It brings its own head, which may have another number of classes than the base's.

        Raises:
            UserError: the name is taken, or the adapter cannot be loaded; all is as it was then.
        """
        return self._added(name, lambda: load_adapter(self.model, folder, name, **_OPTIONS, **options))

    def attach(self, strategy: PEFTStrategy, name: str, *, modules_to_train: Collection[str] = ()) -> Adapter:
        """Put a new adapter on the base, to be trained.

        Raises:
            UserError: the name is taken, or the strategy does not fit the base; all is as it was then.
        """
        options: dict[str, Any] = {"modules_to_train": modules_to_train, "keep_base": True}
        return self._added(name, lambda: attach(self.model, strategy, name, **options))

    def combine(
        self, names: Sequence[str], weights: Sequence[float] | None = None, method: str = "sum", *,
        name: str = "combined", **options: Any,
    ) -> Combination:  # fmt: skip
        """Put a new adapter on the base, made of those of these names; `options` are those of `combine.combine`.

        Raises:
            UserError: the name is taken, there is no such adapter, or they cannot be combined; all is as it was then.
        """
        made: list[Combination] = []

        def make() -> Adapter:
            made.append(combine([self[each] for each in names], weights, method, name=name, **options))
            return made[0].adapter

        self._added(name, make)
        return made[0]

    def use(self, *names: str | None) -> None:
        """Let the model compute with the adapters of these names and no others; with none, or None, as the bare base.

        Raises:
            UserError: there is no such adapter, two of them train the same tensor of the base, or another thread
                computes with the model.
        """
        chosen = [self[name] for name in names if name is not None]
        _check_apart(chosen)
        with turn(self.model, chooses=True, short=True):
            for adapter in self:
                if adapter not in chosen:
                    adapter.disable()
            for adapter in chosen:
                adapter.enable()

    @contextmanager
    def using(self, *names: str | None) -> Iterator[None]:
        """Within the block the model computes with the adapters of these names, and for this thread alone.

        Another thread that comes to `using`, `rows`, `use` or another switch waits until the block has ended. After it
        those are in use that were before.

        Raises:
            UserError: as for `use`.
        """
        with turn(self.model):
            before = self.in_use
            self.use(*names)
            try:
                yield
            finally:
                self.use(*before)

    def train(self, *names: str) -> None:
        """Let the parameters of the adapters of these names have gradients and no others; those must be in use.

        Raises:
            UserError: there is no such adapter, or it is off.
        """
        chosen = [self[name] for name in names]
        if off := [adapter.name for adapter in chosen if not adapter.enabled]:
            raise UserError(f"{listed(off)} cannot train while off: use({', '.join(map(repr, names))}) first.")
        self.model.requires_grad_(False)
        for adapter in chosen:
            for parameter in adapter.parameters().values():
                parameter.requires_grad_(True)

    def delete(self, name: str) -> None:
        """Take the adapter of that name off the base for good.

        Raises:
            UserError: there is no such adapter.
        """
        self[name].remove()
        del self._adapters[name]

    def rows(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Within the block, row i of a batch is computed with the adapter `names[i]`, with None by the bare base.

        The model computes for this thread alone there: another one that comes to `rows` or `using` waits.

        Raises:
            UserError: there is no such adapter, it does not act on each row apart, or another thread computes with the
                model.
        """
        return by_rows({name: self[name] for name in names if name is not None}, names, self.using)

    @property
    def names(self) -> list[str]:
        """The names of all adapters."""
        return list(self._adapters)

    @property
    def in_use(self) -> list[str]:
        """The names of those that the model computes with."""
        return [adapter.name for adapter in self if adapter.enabled]

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self._adapters.values())

    def __len__(self) -> int:
        return len(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            known = f" There are: {listed(self.names)}." if self._adapters else " None is loaded."
            raise UserError(f"There is no adapter named {name!r}.{nearest(name, self._adapters)}{known}")
        return self._adapters[name]

    def _added(self, name: str, make: Callable[[], Adapter]) -> Adapter:
        if name in self._adapters:
            raise UserError(f"The name {name!r} is taken by a {type(self[name].strategy).__name__}; choose another.")
        trainable = {id(p) for p in self.model.parameters() if p.requires_grad}
        with self.using():  # the new one has to meet the base's own values
            adapter = make()
            adapter.disable()
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) in trainable)
        self._adapters[name] = adapter
        return adapter


def _check_apart(adapters: Sequence[Adapter]) -> None:
    """See that no two of them hold values for the same tensor of the base."""
    owner: dict[str, str] = {}
    for adapter in adapters:
        for name in adapter.originals:
            other = owner.setdefault(name, adapter.name)
            if other != adapter.name:
                raise UserError(f"{other!r} and {adapter.name!r} both train {name}; only one of them can be in use.")
