"""Where the rows of a batch are within a model: which dimension of a module's input counts them, and how often."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.errors import UserError


class RowOrder:
    """What the model that is being computed was given, against which the inputs of its modules are judged.

    A model within the model (an encoder, a vision tower) has a batch and lengths of its own while it is computed.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        """
        Args:
            model: whose modules are judged.
            rows: what a batch of it must have; within `generate` also a multiple, each row in one block (beams).
        """
        self.model, self.rows = model, rows
        self._batch = 0
        self._lengths: set[int] = set()
        self._generates = False
        self._tried: int | None = None
        """The number of rows while the model is tried with its dummy inputs."""
        self._proven = False
        self._thread = threading.get_ident()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block the inputs of the model, and of models within it, are noted."""
        inner = {module for module in self.model.modules() if hasattr(module, "get_input_embeddings")}
        hooks = [each.register_forward_pre_hook(self._note, with_kwargs=True) for each in {self.model, *inner}]
        own: Callable[..., Any] | None = getattr(self.model, "generate", None)
        before = self.model.__dict__.get("generate")
        if own is not None:
            self.model.__dict__["generate"] = self._generating(own)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            if before is not None:
                self.model.__dict__["generate"] = before
            else:
                self.model.__dict__.pop("generate", None)

    @property
    def tried(self) -> bool:
        """Whether the model is only being tried, so that no row belongs to anyone."""
        return self._tried is not None

    def repeats(self, module: nn.Module, x: Tensor) -> int:
        """How many entries of the first dimension of a module's input belong to each row, one row after the other.

        Raises:
            UserError: the batch has another number of rows, or the first dimension is not that of the rows.
        """
        if not torch.compiler.is_compiling() and threading.get_ident() != self._thread:
            raise UserError(
                f"A {type(module).__name__} was called by another thread than the one whose rows are computed, so that "
                "the result would be wrong. Let each thread compute within `rows` or `using`: they wait for each other."
            )
        rows = self._tried or self.rows
        times, rest = divmod(self._batch, rows)
        if rest or not times or (times > 1 and not self._generates):
            raise UserError(
                f"The batch was said to have {rows} rows, but what this {type(module).__name__} belongs to got "
                f"{self._batch}: give one adapter name for each row."
            )
        if len(x) == self._batch in self._lengths and not self._proven:
            self._try()
        per_row = 1 if isinstance(module, nn.Embedding) else 2
        flattened = {self._batch * length for length in self._lengths} if x.dim() == per_row else set()
        if len(x) not in {self._batch, *flattened}:
            raise UserError(
                f"A {type(module).__name__} of this {type(self.model).__name__} got an input of shape "
                f"{tuple(x.shape)}, whose first dimension does not count the {self._batch} rows of the batch, so they "
                "cannot be told apart there. Use one adapter for the whole batch."
            )
        return len(x) // rows

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        main = [kwargs.get(key) for key in (getattr(module, "main_input_name", "input_ids"), "inputs_embeds")]
        given = list(_tensors((*main, *args, *kwargs.values())))
        self._batch = next((len(each) for each in given if each.dim() > 1), 0)
        self._lengths = {each.shape[1] for each in given if each.dim() in (2, 3)}

    def _generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate` for a batch of exactly these rows, which it may repeat."""

        def of_these_rows(*args: Any, **kwargs: Any) -> Any:
            given = [each for each in _tensors((*args, *kwargs.values())) if each.dim() > 1]
            if given and len(given[0]) != self.rows:
                raise UserError(
                    f"The batch was said to have {self.rows} rows, but generate got {len(given[0])}: "
                    "give one adapter name for each row."
                )
            self._generates = True
            try:
                return generate(*args, **kwargs)
            finally:
                self._generates = False

        return of_these_rows

    def _try(self) -> None:
        """Where there are as many tokens as rows, see on a batch with another number of them which comes first.

        Raises:
            UserError: the model has the tokens first, or no batch to try it with.
        """
        noted = self._batch, self._lengths
        if self.tried:
            raise ValueError("its dummy inputs have as many tokens as rows")
        dummy: dict[str, Tensor] = getattr(self.model, "dummy_inputs", {})
        self._tried = len(next(iter(dummy.values()), ()))
        try:
            self.model(**{key: value.to(next(self.model.parameters()).device) for key, value in dummy.items()})
            self._proven = True
        except Exception as error:
            raise UserError(
                f"The batch has as many tokens in a row as rows, {noted[0]}, and it cannot be found out which of the "
                f"two this {type(self.model).__name__} puts first. Pad the rows to another length. What was tried: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            self._tried = None
            self._batch, self._lengths = noted


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    return (value for value in values if isinstance(value, Tensor))
