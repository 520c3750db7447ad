"""The table of architectures against the models of transformers and the table of HF PEFT."""

import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, logging
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from peftlight.architectures import _FAMILIES, ARCHITECTURES, Architecture
from peftlight.linear import is_linear
from peftlight.targets import select

peft_constants = pytest.importorskip("peft.utils.constants")
PEFT_TABLE: dict[str, Any] = peft_constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

REMOTE_CODE = {"chatglm", "RefinedWeb", "RefinedWebModel", "btlm", "rwkv7"}
"""Not in transformers: their rows are data that nothing here can check."""

OTHER_DEFAULT = {"blip-2": "HF PEFT also lists 'q' and 'v', which match nothing in transformers 5"}
"""Where the default is not that of HF PEFT, and why."""

SMALL = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}

OTHER_ATTENTION = {
    "mobilebert": "the bottleneck in front of its attention is named attention",
    "prophetnet": "its relative positions are a linear layer inside attention",
    "timesformer": "a linear layer that mixes the output of attention stands outside of it",
    "wav2vec2-conformer": "its relative positions are a linear layer inside attention",
    "wavlm": "the gate of its relative positions is a linear layer inside attention",
}
"""Where linear layers in attention blocks are not the table's attention layers, and why."""

BUILT = sorted(set(ARCHITECTURES) - REMOTE_CODE)

T5_LIKE = ("t5", "mt5", "umt5", "longt5", "udop")

# A name counts as found when one of these variants of the model has it.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "esm": [{"vocab_size": 33, "pad_token_id": 1}],
    "ministral": [SMALL],
    "hunyuan_v1_dense": [SMALL],
    "nemotron": [SMALL],
    "gpt2": [{"add_cross_attention": True}],
    "gpt-sw3": [{"add_cross_attention": True}],
    "gpt_bigcode": [{"add_cross_attention": True, "multi_query": False}],
    **{name: [{}, {"q_lora_rank": None}] for name in ("deepseek_v2", "deepseek_v3", "minicpm3")},
    **{name: [{"feed_forward_proj": how} for how in ("relu", "gated-gelu")] for name in T5_LIKE},
}
INSIDE = {"mllama_text_model": "mllama"}
"""Parts that no Auto class builds by themselves."""


def build(model_type: str, **changes: Any) -> nn.Module:
    """The model with the sizes of its default config: on the meta device they cost nothing."""
    config = CONFIG_MAPPING[INSIDE.get(model_type, model_type)](**changes)
    auto = AutoModel if type(config) in MODEL_MAPPING else AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config)
    return model


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_linear(module)]


def ends_with(names: Iterable[str], ends: Iterable[str]) -> set[str]:
    return {name for name in names if any(f".{name}".endswith(f".{end}") for end in ends)}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.set_verbosity_error()


@pytest.mark.parametrize("model_type", BUILT)
@pytest.mark.filterwarnings("ignore")
def test_every_name_is_in_the_model(model_type: str) -> None:
    row = ARCHITECTURES[model_type]
    models = [build(model_type, **changes) for changes in VARIANTS.get(model_type, [{}])]
    names = {name for model in models for name in linear_names(model)}
    if isinstance(row.default, str):
        assert any(re.fullmatch(row.default, name) for name in names)
    asked = {*row.attention, *row.mlp, *(row.default if isinstance(row.default, tuple) else ())}
    assert not {end for end in asked if not ends_with(names, [end])}, sorted(names)
    if model_type not in OTHER_ATTENTION:
        assert_attention_is_complete(models[0], row)


def assert_attention_is_complete(model: nn.Module, row: Architecture) -> None:
    """The table and the structure of the model are two independent sources for what is in attention blocks."""
    vars(model)["config"] = None
    multihead = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    names = [name for name in linear_names(model) if name.rpartition(".")[0] not in multihead]
    if row.attention:
        structural = set(select(model, "attention", (nn.Linear,)).modules)
        assert structural == ends_with(names, row.attention)
    else:
        assert not ends_with(names, ["q_proj", "query", "qkv"])


@pytest.mark.parametrize("model_type", sorted(PEFT_TABLE))
def test_default_is_that_of_peft(model_type: str) -> None:
    default = ARCHITECTURES[model_type].default
    if model_type in OTHER_DEFAULT:
        assert isinstance(default, tuple)
        assert set(default) < set(PEFT_TABLE[model_type])
    else:
        assert (default if isinstance(default, str) else list(default)) == PEFT_TABLE[model_type]


def test_all_of_pefts_architectures_and_many_more_are_covered() -> None:
    assert len(set(PEFT_TABLE) & set(ARCHITECTURES)) >= 40
    assert len(ARCHITECTURES) >= 180
    assert REMOTE_CODE.isdisjoint(CONFIG_MAPPING)


def test_no_model_type_is_in_two_families() -> None:
    model_types = [name for _, names in _FAMILIES for name in names.split()]
    assert len(model_types) == len(set(model_types))
