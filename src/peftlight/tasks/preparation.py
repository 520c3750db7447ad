"""What a strategy gets to look at before a training begins."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peftlight.strategy import Material

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


def prepare_strategy(module: "PEFTModule") -> None:
    """Let the module's strategy initialise from the training data, with random numbers of its own.

    They are the same in every process, and the order of the training rows does not depend on them.
    """
    assert module.adapter is not None
    trainer = module.trainer
    module.to(trainer.strategy.root_device)
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices), trainer.precision_plugin.forward_context():
        torch.manual_seed(0)
        material = Material(lambda: _training_inputs(module), lambda text: _token_ids(module, text))
        module.strategy.prepare(module.adapter, material)


def _training_inputs(module: "PEFTModule") -> Iterator[Mapping[str, Tensor]]:
    trainer: Any = module.trainer
    source = getattr(trainer, "datamodule", None) or trainer.fit_loop._data_source.instance
    loader = source.train_dataloader() if hasattr(source, "train_dataloader") else source
    for batch in loader:
        yield {key: value.to(module.device) for key, value in module.inputs(batch).items()}


def _token_ids(module: "PEFTModule", text: str) -> list[int]:
    ids: list[int] = module.tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids
