"""How many tokens a training takes in per second."""

import time
from collections.abc import Mapping

from torch import Tensor


class TokenRate:
    """Tokens that are no padding, from one optimizer step to the next, on this process."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Begin to count from now."""
        self._tokens: Tensor | None = None
        self._since = time.monotonic()

    def add(self, batch: Mapping[str, Tensor]) -> None:
        """Count a batch; one without an attention mask has no tokens."""
        if "attention_mask" in batch:
            tokens = batch["attention_mask"].sum()  # stays on the device: no waiting for it
            self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def take(self) -> Tensor | None:
        """Tokens per second since the start, and start over; None where there were none."""
        now = time.monotonic()
        rate = None if self._tokens is None else self._tokens / (now - self._since)
        self._tokens, self._since = None, now
        return rate
