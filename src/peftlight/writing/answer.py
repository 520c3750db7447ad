"""One answer while it is written: its text is told piece by piece as the tokens come."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Answer:
    """The one row that is written; generation calls it after each token, and asks whether to stop."""

    decode: Callable[[list[int]], str]
    """From tokens to their text."""
    ends: Sequence[int]
    """Tokens that end the answer."""
    stop: str
    """Text that ends it and is no part of it."""
    tell: Callable[[str], None]
    """Gets each new piece of text."""
    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    told: int = 0
    """How many characters have been told."""

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        if not self.stopped:
            self.tokens.append(int(input_ids[0, -1]))
            text = self.decode(self.tokens)
            self.stopped = self.tokens[-1] in self.ends or bool(self.stop and self.stop in text)
            self._tell(text[: _sure(text, self.stop)])
        return torch.tensor([self.stopped], device=input_ids.device)

    @property
    def text(self) -> str:
        """What is written so far."""
        text = self.decode(self.tokens)
        return text.partition(self.stop)[0] if self.stop else text

    def end(self) -> None:
        """Tell what was held back."""
        self._tell(self.text)

    def _tell(self, text: str) -> None:
        if len(text) > self.told:
            self.tell(text[self.told :])
            self.told = len(text)


def _sure(text: str, stop: str) -> int:
    """How many characters of an unfinished text are there to stay: no half of a character, no beginning of `stop`."""
    if stop in text:
        return text.index(stop) if stop else len(text.rstrip("\ufffd"))
    begun = next((size for size in range(len(stop) - 1, 0, -1) if text.endswith(stop[:size])), 0)
    return len(text[: len(text) - begun].rstrip("\ufffd"))
