"""Folders with tiny models and their tokenizer, as a user has them."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from models import make


def tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.BPE(unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["[UNK]", "[PAD]", "[BOS]", "[EOS]"]
    words = ["a film to see again", "nothing here works", "write a list of three colours", "patience is a slow river"]
    plain.train_from_iterator(words, trainers.BpeTrainer(vocab_size=400, special_tokens=special,
                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]",
                                   eos_token="[EOS]")  # fmt: skip


def save_encoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, pad_token_id=1, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)  # fmt: skip
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_vision(folder: Path) -> Path:
    make("vit").vit.save_pretrained(folder)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def save_decoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, intermediate_size=64, bos_token_id=2, eos_token_id=3)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_encoder_decoder(folder: Path) -> Path:
    torch.manual_seed(0)
    config = T5Config(vocab_size=400, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=1,
                      eos_token_id=3, decoder_start_token_id=1)  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
