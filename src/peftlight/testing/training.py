"""A strategy on a model with a batch, and a plain training loop that calls every hook as a real one does."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from peftlight.strategy import Adapter, Material, PEFTStrategy, attach
from peftlight.train_mode import put_in_train_mode

STEPS = 12
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Case:
    """A strategy, a model and a batch that fits it; each use makes the first two anew, always the same."""

    make_strategy: Callable[[], PEFTStrategy]
    make_model: Callable[[], nn.Module]
    inputs: Mapping[str, Tensor]

    def attached(self, model: nn.Module | None = None) -> Adapter:
        """The strategy on a model, before it has looked at any data."""
        model = self.make_model() if model is None else model
        torch.manual_seed(7)
        return attach(model, self.make_strategy())

    def prepared(self, model: nn.Module | None = None) -> Adapter:
        """The strategy on a model, ready to train."""
        adapter = self.attached(model)
        torch.manual_seed(8)
        adapter.strategy.prepare(adapter, Material(self._batches, _letters))
        return adapter

    def stirred(self, model: nn.Module | None = None) -> Adapter:
        """The strategy on a model, with noise on all that trains, so that every tensor changes the output."""
        adapter = self.prepared(model)
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return adapter

    @torch.no_grad()
    def output(self, model: nn.Module) -> Tensor:
        """The model's scores for the batch, in eval mode."""
        result = model.eval()(
            **{key: value for key, value in self.inputs.items() if key != "labels"}, **self._shifted()
        )
        scores: Tensor = result.logits if hasattr(result, "logits") else result
        return scores

    def loss(self, model: nn.Module) -> Tensor:
        """The model's own loss for the batch; of a model that has none, the mean square of its output."""
        result = model(**self.inputs)
        return result.loss if hasattr(result, "loss") else result.square().mean()

    def _batches(self) -> Iterable[Mapping[str, Tensor]]:
        return [{key: value for key, value in self.inputs.items() if key != "labels"} | self._shifted()]

    def _shifted(self) -> dict[str, Tensor]:
        """What an encoder-decoder reads beside its source: the labels, where it would make them itself."""
        source, labels = self.inputs.get("input_ids"), self.inputs.get("labels")
        if source is None or labels is None or labels.dim() != 2 or labels.shape == source.shape:
            return {}
        return {"decoder_input_ids": labels}


def _letters(text: str) -> list[int]:
    return [ord(letter) % 90 + 2 for letter in text]


class Training:
    """A training of `STEPS` steps with AdamW on one batch, which can be stopped and taken up again."""

    def __init__(self, adapter: Adapter, case: Case, half: bool = False) -> None:
        """
        Args:
            adapter: what is trained.
            case: gives the loss.
            half: compute under autocast to bfloat16.
        """
        self.adapter, self.case, self.half = adapter, case, half
        adapter.strategy.check_steps(STEPS)
        rates, own = adapter.strategy.learning_rates(adapter), adapter.parameters()
        groups = [{"params": [p], "lr": LEARNING_RATE * rates.get(name, 1.0)} for name, p in own.items()]
        self.optimizer = AdamW(groups)

    def run(self, first: int = 1, last: int = STEPS) -> list[float]:
        """The losses of the steps from number `first` to `last`."""
        return [self._step(number) for number in range(first, last + 1)]

    def _step(self, number: int) -> float:
        adapter, strategy = self.adapter, self.adapter.strategy
        torch.manual_seed(number)  # the same dropout, wherever the training was taken up
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            put_in_train_mode(adapter)
            loss = self.case.loss(adapter.model)
        penalty = strategy.penalty(adapter)
        (loss if penalty is None else loss + penalty).backward()
        self.optimizer.step()
        strategy.after_step(adapter, number, STEPS)
        strategy.figures(adapter)
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """All that a checkpoint holds, copied."""
        tensors = {name: value.clone() for name, value in self.adapter.state().items()}
        return {"adapter": tensors, "optimizer": self.optimizer.state_dict()}
