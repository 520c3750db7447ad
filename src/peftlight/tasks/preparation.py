"""What a strategy gets to look at before a training begins."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from peftlight.strategy import Adapter, Material

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


class Initial(Protocol):
    """What a training begins with in place of what its strategy would begin with."""

    def facts(self) -> dict[str, str | None]:
        """Where it comes from, as it is recorded."""

    def take(self, module: "PEFTModule", model: nn.Module) -> None:
        """Read it, before the adapter of the training is on the model."""

    def give(self, adapter: Adapter) -> None:
        """Put it into that adapter."""


def prepare_strategy(module: "PEFTModule") -> None:
    """Let the module's strategy initialise from the training data, with random numbers of its own.

    They are the same in every process, and the order of the training rows does not depend on them. What the first
    process comes to holds for all, should the others have seen other rows.
    """
    assert module.adapter is not None
    trainer = module.trainer
    module.to(trainer.strategy.root_device)
    devices = [module.device] if module.device.type == "cuda" else []
    rows = _training_rows(trainer)
    with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
        torch.manual_seed(0)
        material = Material(lambda: _inputs(module, rows), lambda text: _token_ids(module, text))
        module.strategy.prepare(module.adapter, material)
    if trainer.world_size > 1:
        state = {name: value.cpu() for name, value in module.adapter.state().items()}
        module.adapter.load_state(trainer.strategy.broadcast(state), "the first process")


def _training_rows(trainer: Any) -> Iterable[Mapping[str, Tensor]]:
    """The batches that all processes have together, where the data can tell."""
    source = getattr(trainer, "datamodule", None) or trainer.fit_loop._data_source.instance
    loader = getattr(source, "global_batches", None) or getattr(source, "train_dataloader", None)
    batches: Iterable[Mapping[str, Tensor]] = loader() if loader else source
    return batches


def _inputs(module: "PEFTModule", batches: Iterable[Mapping[str, Tensor]]) -> Iterator[Mapping[str, Tensor]]:
    for batch in batches:
        yield {key: value.to(module.device) for key, value in module.inputs(batch).items()}


def _token_ids(module: "PEFTModule", text: str) -> list[int]:
    ids: list[int] = module.tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids
