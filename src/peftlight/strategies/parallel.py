"""What is computed beside a feed-forward part: two deltas, on the layer that reads the stream and the one that writes.

So it needs no module that is the feed-forward part and nothing else: BERT, BART and OPT have none.
"""

import threading

import torch
from torch import Tensor, nn

from peftlight.delta import Base, Delta
from peftlight.errors import UserError


class ParallelAdapter(Delta):
    """FFN(x) + f(x) (table 1 of He et al.): on the feed-forward's last layer, from the input of its first."""

    def __init__(self, bottleneck: nn.Module, relay: "Relay") -> None:
        super().__init__()
        self.bottleneck, self.relay = bottleneck, relay

    def forward(self, base: Base, inner: Tensor) -> Tensor:
        x = self.relay.take()
        h: Tensor = base(inner)
        return (h + self.bottleneck(x)).to(h.dtype)


class ParallelInput(Delta):
    """W x + b as before; x is handed to the `ParallelAdapter` of the same feed-forward part."""

    def __init__(self, relay: "Relay") -> None:
        super().__init__()
        self.relay = relay

    def forward(self, base: Base, x: Tensor) -> Tensor:
        self.relay.hand_over(x)
        h: Tensor = base(x)
        return h


class Relay:
    """Hands x on within one forward of a feed-forward part, and is empty before and after it.

    A recomputation for gradient checkpointing hands over anew. It may stop early, but only at or after the last layer,
    which takes x before it computes anything. Each thread that computes with the model has its own x.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.held: dict[int, Tensor] = {}
        """By the thread's number; 0 in what `torch.compile` traces, which knows of no threads."""

    def hand_over(self, x: Tensor) -> None:
        self.held[0 if torch.compiler.is_compiling() else threading.get_ident()] = x

    def take(self) -> Tensor:
        """The x handed over.

        Raises:
            UserError: there is none.
        """
        x = None if torch.compiler.is_compiling() else self.held.pop(threading.get_ident(), None)
        x = self.held.pop(0, None) if x is None else x
        if x is None:
            raise UserError(f"The parallel adapter has no input, because {self.source} was not called before it.")
        return x

    def __reduce__(self) -> tuple[type["Relay"], tuple[str]]:
        return Relay, (self.source,)  # copies and pickles are empty
