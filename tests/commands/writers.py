"""Tiny models that write, in folders, with adapters beside them; and what they write, computed without any of ours."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders, pre_tokenizers
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bases import tokenizer
from peftlight import attach, load_adapter, save_adapter
from peftlight.pretrained import Source
from peftlight.strategy import PEFTStrategy

POSITIONS = 160
TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '[PAD]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""A turn ends with [PAD]: another token than the one that ends texts, as in many chat models."""
CLASSES = {"gpt2": "AutoModelForCausalLM", "llama": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM"}


def model(kind: str) -> nn.Module:
    """Its weights are large, so that each token depends on those before it."""
    torch.manual_seed(3)
    own: dict[str, Any] = {"vocab_size": 400, "bos_token_id": 2, "eos_token_id": 3}
    if kind == "gpt2":
        wide = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.5}
        return GPT2LMHeadModel(GPT2Config(**own, **wide))
    if kind == "llama":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        more = {"intermediate_size": 64, "max_position_embeddings": POSITIONS, "initializer_range": 0.5}
        return LlamaForCausalLM(LlamaConfig(**own, **sizes, **more))
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "initializer_factor": 3.0}
    return T5ForConditionalGeneration(T5Config(**own, **sizes, decoder_start_token_id=1, pad_token_id=1))


def base_in(folder: Path, kind: str, pad: bool = True, template: str | None = None) -> Path:
    """A folder with a model and its tokenizer."""
    model(kind).save_pretrained(folder)
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.backend_tokenizer.decoder = decoders.ByteLevel()
    words.chat_template = template
    if not pad:
        words.pad_token = None
    words.save_pretrained(folder)
    return folder


def adapter_in(folder: Path, base: Path, strategy: PEFTStrategy, seed: int = 1, encoder: object = None) -> Path:
    """A folder with an adapter of the base that changes what it writes."""
    auto_class = _class_of(base)
    adapter = attach(loaded(base), strategy)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    save_adapter(adapter, folder, {"base": {"name": str(base), "auto_class": auto_class}, "data": {"encoder": encoder}})
    return folder


def loaded(base: Path, adapter: Path | None = None) -> nn.Module:
    """The model of the folder, with the adapter on it."""
    found, _ = Source(str(base)).load_model(_class_of(base))
    if adapter is not None:
        load_adapter(found, adapter)
    return found.eval()


def greedy(model: nn.Module, tokens: Sequence[int], count: int, ends: Sequence[int] = (3,)) -> list[int]:
    """The likeliest token again and again, from the scores of the whole row each time: no padding, no cache."""
    written: list[int] = []
    with torch.no_grad():
        while len(written) < count and not set(written) & set(ends):
            if model.config.is_encoder_decoder:
                inputs = {"input_ids": [list(tokens)], "decoder_input_ids": [[1, *written]]}
            else:
                inputs = {"input_ids": [[*tokens, *written]]}
            scores = model(**{name: torch.tensor(rows) for name, rows in inputs.items()}).logits[0, -1]
            written.append(int(scores.argmax()))
    return written


def _class_of(base: Path) -> str:
    return CLASSES[json.loads((base / "config.json").read_text())["model_type"]]


def words_of(base: Path) -> Any:
    """The tokenizer of a folder."""
    return Source(str(base)).load_tokenizer()


def records(text: str) -> list[dict[str, Any]]:
    """The lines of JSONL."""
    return [json.loads(line) for line in text.splitlines()]
