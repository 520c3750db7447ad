"""Which token is written next: the likeliest, or one drawn by chance."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from peftlight.writing.settings import Settings


class Choosing:
    """Turns scores (rows, vocabulary) into others whose largest is, in each row, the token to write.

    A row's result depends on its own tokens and number alone, never on the rows and the padding beside it. That is why
    the draw is made by the Gumbel-max trick: argmax(z / T + g) with g = -log(-log u), u uniform, is a sample of
    softmax(z / T) (A* Sampling, Chris J. Maddison, Daniel Tarlow, Tom Minka, 2014, https://arxiv.org/abs/1411.0030),
    and each row has noise of its own.
    """

    def __init__(self, settings: Settings, numbers: Sequence[int], skipped: Sequence[int]) -> None:
        """
        Args:
            settings: how tokens are chosen.
            numbers: of each row the number that, with the seed, decides its noise.
            skipped: of each row how many tokens at its beginning are padding.
        """
        self.settings, self.skipped = settings, skipped
        self.noise = [_generator(settings.seed, number) for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The new scores, after the tokens (rows, length) that stand there already."""
        settings = self.settings
        if settings.repetition_penalty != 1:
            scores = penalized(scores, self._seen(input_ids, scores.shape[1]), settings.repetition_penalty)
        if settings.temperature == 0:
            return scores
        scores = nucleus(likeliest(scores / settings.temperature, settings.top_k), settings.top_p)
        noise = [-torch.empty(scores.shape[1]).exponential_(generator=generator).log() for generator in self.noise]
        return scores + torch.stack(noise).to(scores)

    def _seen(self, input_ids: Tensor, vocabulary: int) -> Tensor:
        """Whether each token of the vocabulary stands in the row, (rows, vocabulary)."""
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        skipped = torch.tensor(self.skipped, device=input_ids.device)[:, None]
        tokens = input_ids.masked_fill(place < skipped, vocabulary)
        return tokens.new_zeros(len(tokens), vocabulary + 1).scatter(1, tokens, 1)[:, :vocabulary].bool()


def penalized(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """z / θ where a seen token's score z is positive, z θ where it is not.

    CTRL: A Conditional Transformer Language Model for Controllable Generation, Nitish Shirish Keskar and others, 2019,
    https://arxiv.org/abs/1909.05858, section 4.1, in the form that works for scores below zero too.
    """
    return torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)


def likeliest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest scores of each row, the others -∞; with 0 all."""
    if not 0 < count < scores.shape[1]:
        return scores
    return scores.masked_fill(scores < scores.topk(count).values[:, -1:], -torch.inf)


def nucleus(scores: Tensor, mass: float) -> Tensor:
    """The scores of the fewest likeliest tokens whose probabilities reach `mass`, the others -∞.

    The Curious Case of Neural Text Degeneration, Ari Holtzman and others, 2020, https://arxiv.org/abs/1904.09751.
    """
    if mass == 1:
        return scores
    ordered, places = scores.sort(dim=1, descending=True)
    probabilities = ordered.softmax(1)
    outside = probabilities.cumsum(1) - probabilities >= mass
    return ordered.masked_fill(outside, -torch.inf).gather(1, places.argsort(1))


def _generator(seed: int, number: int) -> torch.Generator:
    # A generator of torch looks at 32 bits of its seed only, so the two numbers are mixed first.
    return torch.Generator().manual_seed(random.Random(f"{seed} {number}").getrandbits(32))
