"""A base in half precision: what trains stays in float32, and where the two cannot meet, that is said before a step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models import make
from peftlight.errors import UserError
from peftlight.strategies import BitFit, LoRA
from peftlight.tasks import CausalLM, SequenceClassification
from tasks.small import QUIET, Rows, Watch, batches, class_rows, constant, loader, quiet_trainer, token_rows

pytestmark = QUIET

ROWS = class_rows([5, 9, 4, 12], [0, 1, 2, 1])


@pytest.fixture
def folder(tmp_path: Path) -> str:
    make("bert").save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


@pytest.mark.parametrize("strategy", [LoRA(rank=2), BitFit()], ids=["LoRA", "BitFit"])
def test_a_bfloat16_base_trains_under_mixed_precision(strategy: Any, folder: str, tmp_path: Path) -> None:
    options = {"dtype": "bfloat16", "optimizer": fast, "lr_scheduler": constant}
    module, watch = SequenceClassification(folder, strategy, **options), Watch()
    trainer = quiet_trainer(tmp_path, [watch], max_epochs=15, precision="bf16-mixed", check_val_every_n_epoch=15)
    trainer.fit(module, Rows(batches(ROWS, 4), label_names=["a", "b", "c"]))
    assert module.adapter is not None
    assert module.model is not None
    own = module.adapter.parameters()
    assert {p.dtype for p in own.values()} == {torch.float32}
    frozen = {name: p for name, p in module.model.named_parameters() if name not in own}
    assert {p.dtype for p in frozen.values() if p.dim() == 2} == {torch.bfloat16}
    if isinstance(strategy, LoRA):
        assert {p.dtype for p in frozen.values()} == {torch.bfloat16}
    losses = [logged["train_loss"] for logged in watch.logged]
    assert losses[-1] < 0.7 * losses[0]


def test_without_mixed_precision_a_trained_head_is_refused_with_the_ways_out(folder: str, tmp_path: Path) -> None:
    module = SequenceClassification(folder, LoRA(rank=2), dtype="bfloat16", num_labels=3)
    with pytest.raises(UserError, match=r"(?s)classifier.*--trainer.precision bf16-mixed.*--model.dtype float32"):
        quiet_trainer(tmp_path, precision="32-true").fit(module, loader(batches(ROWS, 2)))


def test_the_refusal_also_meets_a_module_that_was_made_ready_before(folder: str, tmp_path: Path) -> None:
    module = SequenceClassification(folder, LoRA(rank=2), dtype="bfloat16", num_labels=3)
    module.configure_model()
    for _ in range(2):
        with pytest.raises(UserError, match="bf16-mixed"):
            quiet_trainer(tmp_path, precision="32-true").fit(module, loader(batches(ROWS, 2)))


def test_lora_alone_trains_on_a_bfloat16_base_without_mixed_precision(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "llama")
    options = {"dtype": "bfloat16", "trained_modules": [], "optimizer": fast, "lr_scheduler": constant}
    strategy = LoRA(rank=8, target_modules="all-linear")
    module, watch = CausalLM(str(tmp_path / "llama"), strategy, **options), Watch()
    rows = token_rows([5, 9, 4, 12])
    quiet_trainer(tmp_path, [watch], max_epochs=30, precision="32-true").fit(module, loader(batches(rows, 4)))
    assert watch.logged[-1]["train_loss"] < 0.9 * watch.logged[0]["train_loss"]
    assert {p.dtype for p in watch.parameters[-1].values()} == {torch.float32}


def test_a_loaded_checkpoint_on_a_bfloat16_base_predicts_as_before(folder: str, tmp_path: Path) -> None:
    module = SequenceClassification(folder, LoRA(rank=2), dtype="bfloat16")
    trainer = quiet_trainer(tmp_path, precision="bf16-mixed")
    trainer.fit(module, Rows(batches(ROWS, 2), label_names=["a", "b", "c"]))
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(tmp_path / "done.ckpt")
    assert trainer.predict(loaded, loader(batches(ROWS, 2))) == trainer.predict(module, loader(batches(ROWS, 2)))
