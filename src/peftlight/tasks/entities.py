"""Entities in a sequence of tags, and how many of them a model finds."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from peftlight.tasks.token_losses import IGNORED

_OUTSIDE = "O"


def marks_entities(names: Sequence[str]) -> bool:
    """Whether tags with these names mark entities as IOB2 or IO does: every one is O, B-something or I-something."""
    others = [name for name in names if name != _OUTSIDE]
    return bool(others) and all(name[:2] in ("B-", "I-") and name[2:] for name in others)


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """The entities that tags mark: the place of the first word, that after the last one, and the type.

    An entity of type X begins at B-X, and at an I-X that does not continue one: at the first place, after O, or after
    a tag of another type. It goes on over every I-X that follows. For tags that keep to IOB2 these are its entities;
    for IO, which has no B-, words of one type beside each other are one entity.
    """
    found, start = set(), 0
    for place, tag in enumerate(tags):
        if tag == _OUTSIDE:
            continue
        kind = tag[2:]
        if place == 0 or tag[:2] == "B-" or tags[place - 1] == _OUTSIDE or tags[place - 1][2:] != kind:
            start = place
        if place + 1 == len(tags) or tags[place + 1] != f"I-{kind}":
            found.add((start, place + 1, kind))
    return found


class EntityScores(Metric):
    """Precision, recall and F1 of entities over all types; one is right if its words and its type are exactly so."""

    full_state_update = False
    hits: Tensor
    guessed: Tensor
    real: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        """
        Args:
            names: the tags in the order of their numbers.
        """
        super().__init__()
        self.names = list(names)
        for count in ("hits", "guessed", "real"):
            self.add_state(count, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, guesses: Tensor, labels: Tensor) -> None:
        """Count rows in: guesses and labels (batch, length); where a label is -100 there is no tag, and no gap."""
        for row, truth in zip(guesses.tolist(), labels.tolist(), strict=True):
            scored = [place for place, label in enumerate(truth) if label != IGNORED]
            guessed = entities([self.names[row[place]] for place in scored])
            real = entities([self.names[truth[place]] for place in scored])
            self.hits += len(guessed & real)
            self.guessed += len(guessed)
            self.real += len(real)

    def compute(self) -> dict[str, Tensor]:
        """The three shares; 0 where there is nothing to divide by."""
        return {
            "precision": self.hits / self.guessed.clamp(min=1),
            "recall": self.hits / self.real.clamp(min=1),
            "f1": 2 * self.hits / (self.guessed + self.real).clamp(min=1),
        }
