"""Tiny models of six architectures, and convolutional ones, made from configs, with inputs that fit them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCABULARY = 100
CLASSES = 3

_ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_labels": CLASSES,
}
_TEXT: dict[str, Any] = {**_ENCODER, "vocab_size": VOCABULARY, "max_position_embeddings": 40}


def bert(dropout: float = 0.0) -> nn.Module:
    """A BERT that classifies sequences."""
    rates: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return BertForSequenceClassification(BertConfig(**_TEXT, **rates))


def roberta(dropout: float = 0.0) -> nn.Module:
    """A RoBERTa that classifies sequences; its head has two layers."""
    rates: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return RobertaForSequenceClassification(RobertaConfig(**_TEXT, **rates))


def llama(dropout: float = 0.0) -> nn.Module:
    """A Llama that predicts tokens, with two heads of keys for four of queries."""
    return LlamaForCausalLM(LlamaConfig(**_TEXT, num_key_value_heads=2, attention_dropout=dropout))


def llama_classifier(dropout: float = 0.0) -> nn.Module:
    """A Llama that classifies sequences."""
    sizes = {**_TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
    return LlamaForSequenceClassification(LlamaConfig(**sizes, attention_dropout=dropout))


def gpt2(dropout: float = 0.0) -> nn.Module:
    """A GPT-2 that predicts tokens; its output embedding is tied to the input's."""
    rates: dict[str, Any] = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=40, **rates))


def t5(dropout: float = 0.0) -> nn.Module:
    """A T5 that writes one sequence from another."""
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}
    config = T5Config(**sizes, num_heads=4, dropout_rate=dropout)
    config.decoder_start_token_id = 0
    return T5ForConditionalGeneration(config)


def vit(dropout: float = 0.0) -> nn.Module:
    """A ViT that classifies images."""
    rates: dict[str, Any] = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return ViTForImageClassification(ViTConfig(**_ENCODER, image_size=16, patch_size=8, **rates))


def convnext(dropout: float = 0.0) -> nn.Module:
    """A ConvNeXt: depthwise convolutions, and linear layers that act on channels."""
    sizes: dict[str, Any] = {"num_stages": 2, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": CLASSES}
    return ConvNextForImageClassification(ConvNextConfig(**sizes, drop_path_rate=dropout, layer_scale_init_value=1.0))


def resnet(dropout: float = 0.0) -> nn.Module:
    """A ResNet: convolutions and BatchNorm, and no linear layer but the head; it has no dropout."""
    sizes: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_labels": CLASSES}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def mobilenet(dropout: float = 0.0) -> nn.Module:
    """A MobileNetV2: depthwise and 1 x 1 convolutions and BatchNorm; padding is made outside of the layers."""
    sizes: dict[str, Any] = {"depth_multiplier": 0.35, "initializer_range": 0.15, "num_labels": CLASSES}
    return MobileNetV2ForImageClassification(MobileNetV2Config(**sizes, classifier_dropout_prob=dropout))


CONVOLUTIONAL: dict[str, Callable[..., nn.Module]] = {"convnext": convnext, "resnet": resnet, "mobilenet": mobilenet}
"""Networks of convolutions, which classify images. Not every strategy has a place there, so they are no part of
`MODELS`."""

MODELS: dict[str, Callable[..., nn.Module]] = {
    "bert": bert,
    "roberta": roberta,
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "vit": vit,
}
"""One model for each architecture."""


def make(name: str, dropout: float = 0.0, seed: int = 0) -> nn.Module:
    """The model of that name, the same for the same seed; in eval mode, as transformers loads models."""
    torch.manual_seed(seed)
    build = {**MODELS, **CONVOLUTIONAL, "llama_classifier": llama_classifier}[name]
    return build(dropout).eval()


def inputs_for(name: str, seed: int = 1, batch: int = 4, length: int = 7) -> dict[str, Tensor]:
    """A batch that fits the model, with labels."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(0, CLASSES, (batch,), generator=generator)
    if name == "vit" or name in CONVOLUTIONAL:
        side = 16 if name == "vit" else 32
        return {"pixel_values": torch.randn(batch, 3, side, side, generator=generator), "labels": classes}
    tokens = torch.randint(2, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    mask[0, length - 2 :] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if name in ("llama", "gpt2"):
        return {**inputs, "labels": tokens.masked_fill(mask == 0, -100)}
    if name == "t5":
        return {**inputs, "labels": torch.randint(2, VOCABULARY, (batch, 5), generator=generator)}
    return {**inputs, "labels": classes}
