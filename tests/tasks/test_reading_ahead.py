"""A language model must not see the token that it is to predict."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import BertConfig, BertLMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM

from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM
from tasks.small import QUIET

pytestmark = QUIET
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def fit(model: torch.nn.Module) -> None:
    ids = torch.randint(0, 50, (4, 6))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    trainer = Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(CausalLM(model, LoRA()), DataLoader(rows, batch_size=4))


def test_an_encoder_that_reads_both_ways_is_refused() -> None:
    with pytest.raises(UserError, match="BertLMHeadModel reads both ways"):
        fit(BertLMHeadModel(BertConfig(**SIZES, initializer_range=1.0)))


def test_a_decoder_is_accepted_whatever_its_config_says() -> None:
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, initializer_range=1.0))
    assert not model.config.is_decoder
    fit(model)
