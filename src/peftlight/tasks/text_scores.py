"""How near a written text is to the one that was wanted.

ROUGE: A Package for Automatic Evaluation of Summaries, Chin-Yew Lin, 2004, https://aclanthology.org/W04-1013/
"""

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torchmetrics import MeanMetric

_WORD = re.compile(r"[^\W_]+")


def exact_match(written: str, wanted: str) -> float:
    """1 if the two texts are the same but for white space around them, else 0."""
    return float(written.strip() == wanted.strip())


def rouge_l(written: str, wanted: str) -> float:
    """The sentence-level ROUGE-L of section 3.1 of the paper, with β = 1, from 0 to 1.

    With l the length of the longest common subsequence of words, P = l / (words written), R = l / (words wanted):
    F = (1 + β²) R P / (R + β² P) = 2 R P / (R + P). Words are runs of letters and digits of any script, in lower case,
    without stemming; for English that is what is usually reported.
    """
    one, other = _WORD.findall(written.lower()), _WORD.findall(wanted.lower())
    common = _longest_common_subsequence(one, other)
    return 2 * common / (len(one) + len(other)) if common else 0.0  # 2 R P / (R + P), multiplied out


def _longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length; `row[j]` is that of the words of `one` so far and the first j of `other`."""
    row = [0] * (len(other) + 1)
    for word in one:
        above, row = row, [0]
        for place, match in enumerate(other):
            row.append(above[place] + 1 if word == match else max(above[place + 1], row[place]))
    return row[-1]


_SCORES = {"exact_match": exact_match, "rouge_l": rouge_l}


class TextScores(nn.ModuleDict):
    """The mean scores of each evaluation stage ("val" or "test"), over all texts and processes."""

    def __init__(self) -> None:
        super().__init__({f"{stage}_{name}": MeanMetric() for stage in ("val", "test") for name in _SCORES})
        self._texts = {"val": 0, "test": 0}

    def count(self, stage: str) -> int:
        """How many texts of the stage this process has scored so far."""
        return self._texts[stage]

    def add(self, stage: str, written: Sequence[str], wanted: Sequence[str]) -> None:
        """Score some texts."""
        self._texts[stage] += len(written)
        for name, score in _SCORES.items():
            for pair in zip(written, wanted, strict=True):
                self._mean(f"{stage}_{name}").update(score(*pair))

    def start_over(self, stage: str) -> None:
        """Forget what was counted in the stage."""
        self._texts[stage] = 0
        for name in _SCORES:
            self._mean(f"{stage}_{name}").reset()

    def figures(self, stage: str) -> dict[str, Tensor]:
        """The stage's scores."""
        return {name: self._mean(name).compute() for name in (f"{stage}_{score}" for score in _SCORES)}

    def _mean(self, name: str) -> MeanMetric:
        mean = self[name]
        assert isinstance(mean, MeanMetric)
        return mean
