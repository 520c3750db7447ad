"""Rows, batches and a quiet Trainer for the tests of the tasks and callbacks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from models import VOCABULARY
from peftlight.strategy import Adapter

Batch = dict[str, Tensor]
Row = dict[str, Any]

QUIET = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning"),
]
"""What Lightning says about runs as small as these."""


def class_rows(lengths: Sequence[int], labels: Sequence[int], seed: int = 3) -> list[Row]:
    """Rows of random tokens with a class each."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(2, VOCABULARY, (length,), generator=generator), "labels": label, "row": number}
        for number, (length, label) in enumerate(zip(lengths, labels, strict=True))
    ]


def token_rows(lengths: Sequence[int], masked: int = 1, seed: int = 3) -> list[Row]:
    """Rows of random tokens, each its own label but for the first `masked` ones."""
    rows = class_rows(lengths, [0] * len(lengths), seed)
    for row in rows:
        row["labels"] = row["input_ids"].clone()
        row["labels"][:masked] = -100
    return rows


def padded(rows: Sequence[Row], left: bool = False) -> Batch:
    """One batch, padded at the right with token 0, or at the left."""
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(value: Tensor, filler: int) -> Tensor:
        gap = torch.full((longest - len(value),), filler)
        return torch.cat([gap, value] if left else [value, gap])

    batch = {
        "input_ids": torch.stack([fill(row["input_ids"], 0) for row in rows]),
        "attention_mask": torch.stack([fill(torch.ones_like(row["input_ids"]), 0) for row in rows]),
        "row": torch.tensor([row["row"] for row in rows]),
    }
    if isinstance(rows[0]["labels"], Tensor):
        return {**batch, "labels": torch.stack([fill(row["labels"], -100) for row in rows])}
    return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def batches(rows: Sequence[Row], size: int) -> list[Batch]:
    """The rows in order, `size` to a batch."""
    return [padded(rows[start : start + size]) for start in range(0, len(rows), size)]


def loader(made: Sequence[Batch]) -> DataLoader[Any]:
    """A loader that gives out just these batches."""
    return DataLoader(list(made), batch_size=None)  # type: ignore[arg-type]


class Rows(LightningDataModule):
    """The same batches for every stage, with what peftlight's tasks look for in a data module."""

    def __init__(
        self, made: Sequence[Batch], label_names: list[str] | None = None, tokenizer: Any = None, batch_size: int = 2
    ) -> None:
        super().__init__()
        self.made, self.label_names, self.tokenizer, self.batch_size = made, label_names, tokenizer, batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.made)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def numbers() -> Any:
    """A tokenizer whose words are the numbers of their tokens."""
    words = {"[PAD]": 0, **{str(number): number for number in range(1, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="1"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", model_max_length=40)


def quiet_trainer(folder: Path, callbacks: Sequence[Callback] = (), **options: Any) -> Trainer:
    """A Trainer on the CPU that writes and shows nothing unless asked to."""
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
        "log_every_n_steps": 1, "default_root_dir": folder, "callbacks": list(callbacks),
    }  # fmt: skip
    return Trainer(**{**settings, **options})


class Watch(Callback):
    """Notes after every optimizer step the gradients, the parameters and what was logged."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []
        self.parameters: list[dict[str, Tensor]] = []
        self.logged: list[dict[str, float]] = []
        self._steps = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            trained = {name: p for name, p in pl_module.model.named_parameters() if p.requires_grad}
            self.gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
            self.parameters.append({name: p.detach().clone() for name, p in trained.items()})
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Standing(torch.optim.SGD):
    """Moves one value by the least there is: a training that moves nothing at all is refused."""

    def step(self, closure: Any = None) -> Any:
        loss = closure() if closure is not None else None
        first = self.param_groups[0]["params"][0].detach().view(-1)
        first[0] = torch.nextafter(first[0], first[0] + 1)
        return loss


def standing_still(parameters: Any) -> torch.optim.Optimizer:
    """An optimizer that keeps everything in its place, so that all gradients are those at one point."""
    return Standing(parameters, lr=0.0)


def constant(optimizer: torch.optim.Optimizer) -> Any:
    """A learning rate that stays as it is."""
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


def stirred(adapter: Adapter) -> None:
    """Move what is trained away from where it starts, where many gradients are zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a model by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    """The same names, and for each of them the same values."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")
