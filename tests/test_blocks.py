"""The blocks of a model by its structure, on families whose layers have the most different names."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel

from models import MODELS, make
from peftlight.blocks import Attention, Block, FeedForward, blocks_of
from peftlight.errors import UserError


def short(block: Block) -> str:
    """The block's layers, as paths within it, in one line."""

    def inside(path: str | None) -> str:
        return "-" if path is None else path.removeprefix(f"{block.path}.")

    def written(attention: Attention) -> str:
        layers = [attention.fused] if attention.fused else [attention.query, attention.key, attention.value]
        mark = "x" if attention.crossed else ""
        return f"{mark}{inside(attention.core)}: {' '.join(map(inside, layers))} > {inside(attention.output)}"

    feed: FeedForward | None = block.feed_forward
    parts = [written(attention) for attention in block.attentions]
    parts += [f"{' '.join(map(inside, feed.inputs))} > {inside(feed.output)}"] if feed else []
    return "; ".join(parts)


BERT = (
    "attention.self: attention.self.query attention.self.key attention.self.value > attention.output.dense; "
    "intermediate.dense > output.dense"
)
BART = "self_attn: self_attn.q_proj self_attn.k_proj self_attn.v_proj > self_attn.out_proj; "
LLAMA = BART.replace("out_proj", "o_proj") + "mlp.gate_proj mlp.up_proj > mlp.down_proj"
GPT2 = "attn: attn.c_attn > attn.c_proj; mlp.c_fc > mlp.c_proj"
T5 = "layer.0.SelfAttention: layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v > "
NEOX = "attention: attention.query_key_value > attention.dense; mlp.dense_h_to_4h > mlp.dense_4h_to_h"
VIT = "attention: attention.q_proj attention.k_proj attention.v_proj > attention.o_proj; mlp.fc1 > mlp.fc2"

TINY = {
    "bert": ["bert.encoder.layer.0", BERT],
    "roberta": ["roberta.encoder.layer.0", BERT],
    "llama": ["model.layers.0", LLAMA],
    "gpt2": ["transformer.h.0", GPT2],
    "t5": [
        "encoder.block.0",
        f"{T5}layer.0.SelfAttention.o; layer.1.DenseReluDense.wi > layer.1.DenseReluDense.wo",
    ],
    "vit": ["vit.layers.0", VIT],
}
OTHERS = {
    "distilbert": "attention: attention.q_lin attention.k_lin attention.v_lin > attention.out_lin; ffn.lin1 > ffn.lin2",
    "modernbert": "attn: attn.Wqkv > attn.Wo; mlp.Wi > mlp.Wo",
    "gpt_neox": NEOX,
    "falcon": NEOX.replace("attention", "self_attention"),
    "opt": f"{BART}fc1 > fc2",
    "phi3": "self_attn: self_attn.qkv_proj > self_attn.o_proj; mlp.gate_up_proj > mlp.down_proj",
    "qwen3": LLAMA,
    "mixtral": LLAMA.partition("; ")[0],
    "bart": f"{BART}fc1 > fc2",
    "swin": VIT,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_tiny_models(name: str) -> None:
    model = make(name)
    blocks = blocks_of(model)
    assert [blocks[0].path, short(blocks[0])] == TINY[name]
    assert len(blocks) == (4 if name == "t5" else 2)
    modules = dict(model.named_modules())
    for block in blocks:
        for attention in block.attentions:
            assert hasattr(modules[attention.core], "config")  # it is the one that computes


def test_the_decoder_of_t5_crosses_over() -> None:
    decoder = blocks_of(make("t5"))[-1]
    assert [attention.crossed for attention in decoder.attentions] == [False, True]
    assert decoder.attentions[1].key == "decoder.block.1.layer.1.EncDecAttention.k"


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_families(model_type: str) -> None:
    config = AutoConfig.for_model(model_type)
    for field in () if model_type == "swin" else ("num_hidden_layers", "n_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, field) and not isinstance(getattr(type(config), field, None), property):
            setattr(config, field, 1)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    plain = [block for block in blocks_of(model) if not any(attention.crossed for attention in block.attentions)]
    assert {short(block) for block in plain} == {OTHERS[model_type]}


def test_a_plain_model_has_no_blocks() -> None:
    with pytest.raises(UserError, match="This Sequential has no stack of blocks"):
        blocks_of(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
