"""Files of transformers 4 on models of transformers 5, whose own tables for base weights are the independent truth."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from interop.exchange import changed, config_in, stir
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.interop.contents import Tensors
from peftlight.interop.hf.renames import translated
from peftlight.strategies import IA3, AdaLoRA, LoRA, Stack, TrainableTokens, VeRA

pytestmark = pytest.mark.filterwarnings("ignore")

_SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_IMAGE = {**_SIZES, "image_size": 8, "patch_size": 4}
_TEXT = {**_SIZES, "vocab_size": 99, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def built(kind: str) -> nn.Module:
    """A tiny model of that class."""
    t = transformers
    torch.manual_seed(0)
    configs: dict[str, Any] = {
        "ViTForImageClassification": lambda: t.ViTConfig(**_IMAGE),
        "DeiTForImageClassification": lambda: t.DeiTConfig(**_IMAGE),
        "BeitForImageClassification": lambda: t.BeitConfig(**_IMAGE),
        "Dinov2ForImageClassification": lambda: t.Dinov2Config(**_IMAGE),
        "SwinForImageClassification": lambda: t.SwinConfig(
            image_size=8, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2
        ),
        "LlavaForConditionalGeneration": lambda: t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**_IMAGE), text_config=t.LlamaConfig(**_TEXT)
        ),
        "Qwen2VLForConditionalGeneration": lambda: t.Qwen2VLConfig(
            text_config={**_TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2},
        ),
        "CLIPTextModel": lambda: t.CLIPTextConfig(**_SIZES, vocab_size=99, bos_token_id=1, eos_token_id=2),
        "CLIPVisionModel": lambda: t.CLIPVisionConfig(**_IMAGE),
        "GPTNeoXForCausalLM": lambda: t.GPTNeoXConfig(**_SIZES, vocab_size=99),
    }
    model: nn.Module = getattr(t, kind)(configs[kind]()).eval()
    return model


V4 = {
    "ViTForImageClassification": [
        ("vit.encoder.layer.1.attention.attention.query", "vit.layers.1.attention.q_proj"),
        ("vit.encoder.layer.0.attention.output.dense", "vit.layers.0.attention.o_proj"),
        ("vit.encoder.layer.0.intermediate.dense", "vit.layers.0.mlp.fc1"),
        ("vit.encoder.layer.0.output.dense", "vit.layers.0.mlp.fc2"),
        ("vit.encoder.layer.0.layernorm_before", "vit.layers.0.layernorm_before"),
    ],
    "DeiTForImageClassification": [
        ("deit.encoder.layer.1.attention.attention.value", "deit.layers.1.attention.v_proj"),
    ],
    "BeitForImageClassification": [
        ("beit.encoder.layer.1.attention.attention.key", "beit.layers.1.attention.k_proj"),
    ],
    "Dinov2ForImageClassification": [
        ("dinov2.encoder.layer.1.attention.attention.key", "dinov2.encoder.layer.1.attention.k_proj"),
        ("dinov2.encoder.layer.1.attention.output.dense", "dinov2.encoder.layer.1.attention.o_proj"),
    ],
    "SwinForImageClassification": [
        ("swin.encoder.layers.1.blocks.0.attention.self.query", "swin.encoder.layers.1.blocks.0.attention.q_proj"),
        ("swin.encoder.layers.0.blocks.0.output.dense", "swin.encoder.layers.0.blocks.0.mlp.fc2"),
    ],
    "LlavaForConditionalGeneration": [
        ("language_model.model.layers.1.self_attn.q_proj", "model.language_model.layers.1.self_attn.q_proj"),
        ("vision_tower.vision_model.encoder.layers.1.self_attn.q_proj",
         "model.vision_tower.encoder.layers.1.self_attn.q_proj"),
        ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        ("language_model.lm_head", "lm_head"),
    ],
    "Qwen2VLForConditionalGeneration": [
        ("model.layers.1.self_attn.q_proj", "model.language_model.layers.1.self_attn.q_proj"),
        ("visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
    ],
    "CLIPTextModel": [("text_model.encoder.layers.1.self_attn.q_proj", "encoder.layers.1.self_attn.q_proj")],
    "CLIPVisionModel": [("vision_model.encoder.layers.1.mlp.fc1", "encoder.layers.1.mlp.fc1")],
    "GPTNeoXForCausalLM": [("embed_out", "lm_head")],
}  # fmt: skip
"""Modules by their names in transformers 4 and today."""


@pytest.mark.parametrize("kind", V4)
def test_names_become_what_transformers_makes_of_them_in_base_weights(kind: str) -> None:
    model = built(kind)
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix, weights = model.base_model_prefix, model.state_dict()
    for old, new in V4[kind]:
        truth, _ = rename_source_key(f"{old}.weight", renamings, converters, prefix, weights)
        assert truth == f"{new}.weight"
        _, tensors = translated({}, {f"base_model.model.{old}.lora_A.weight": torch.zeros(1)}, model)
        assert list(tensors) == [f"base_model.model.{new}.lora_A.weight"]


@pytest.mark.parametrize("kind", [*V4])
def test_names_of_today_stay(kind: str) -> None:
    model = built(kind)
    tensors: Tensors = {f"base_model.model.{path}.lora_A.weight": torch.zeros(1) for path, _ in model.named_modules()}
    config: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
    assert translated(config, tensors, model) == (config, tensors)


def test_llava_between_4_52_and_4_57() -> None:
    key = "base_model.model.model.vision_tower.vision_model.encoder.layers.0.mlp.fc1.lora_A.weight"
    _, tensors = translated({}, {key: torch.zeros(1)}, built("LlavaForConditionalGeneration"))
    assert list(tensors) == ["base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight"]


def older(key: str) -> str:
    """The key of a ViT's tensor as transformers 4 had it; written out apart from the table that is tested."""
    for new, old in {
        "vit.layers": "vit.encoder.layer", "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key", "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    }.items():  # fmt: skip
        key = key.replace(new, old)
    return key


def as_of_v4(adapter: Adapter, folder: Path, **config: Any) -> None:
    save_adapter(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    old = {older(key): value for key, value in tensors.items()}
    changed(folder, config, {**dict.fromkeys(tensors), **old})


ALL = ["query", "key", "value", "dense"]
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "names": (LoRA(rank=2, target_modules=["q_proj", "v_proj"]), {"target_modules": ["query", "value"]}),
    "longer names": (LoRA(rank=2, target_modules=["fc1"]), {"target_modules": ["intermediate.dense"]}),
    "a regex": (LoRA(rank=2, target_modules=["q_proj"]), {"target_modules": r"vit\.encoder\.layer\.\d+\..*\.query"}),
    "all, but some": (
        LoRA(rank=2, target_modules=["q_proj", "k_proj", "v_proj"]),
        {"target_modules": ALL, "exclude_modules": ["dense"]},
    ),
    "one layer": (
        LoRA(rank=2, target_modules=["q_proj"], layers=[1]),
        {"target_modules": ["query"], "layers_to_transform": [1], "layers_pattern": "layer"},
    ),
    "patterns": (
        LoRA(rank=2, target_modules=["q_proj", "fc2"], rank_pattern={"fc2": 3}, alpha_pattern={"q_proj": 5.0}),
        {"target_modules": ["query", "output.dense"], "exclude_modules": ["attention.output.dense"],
         "rank_pattern": {r"\d\.output.dense": 3}, "alpha_pattern": {"query": 5.0}},
    ),
    "a module trained whole": (
        LoRA(rank=2, target_modules=["q_proj"], modules_to_save=["vit.layers.1.mlp.fc1"]),
        {"target_modules": ["query"], "modules_to_save": ["classifier", "layer.1.intermediate.dense"]},
    ),
    "adalora": (
        AdaLoRA(init_r=3, target_r=2, target_modules=["q_proj"]),
        {"target_modules": ["query"]},
    ),
    "ia3": (
        IA3(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
        {"target_modules": r".*(key|\d\.output\.dense)", "feedforward_modules": ["output.dense"]},
    ),
    "vera": (VeRA(8, target_modules=["q_proj"]), {"target_modules": ["query"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_transformers_4(case: str, tmp_path: Path) -> None:
    strategy, config = CASES[case]
    base = built("ViTForImageClassification")
    adapter = attach(copy.deepcopy(base), copy.deepcopy(strategy), modules_to_train=["classifier"])
    stir(adapter.parameters().values())
    as_of_v4(adapter, tmp_path, **config)
    image = torch.randn(2, 3, 8, 8)
    again = load_adapter(base, tmp_path)
    assert again.parameters().keys() == adapter.parameters().keys()
    with torch.no_grad():
        assert torch.equal(again.model(image).logits, adapter.model(image).logits)


def test_the_ranks_of_an_adalora(tmp_path: Path) -> None:
    site = "vit.encoder.layer.0.attention.attention.query"
    key, model = f"base_model.model.{site}.lora_E", built("ViTForImageClassification")
    config, _ = translated({"rank_pattern": {f"{site}.lora_E": [True, False]}}, {key: torch.zeros(1, 1)}, model)
    assert config["rank_pattern"] == {"vit.layers.0.attention.q_proj.lora_E": [True, False]}


def test_tokens_of_a_model_that_is_nested_today(tmp_path: Path) -> None:
    base = built("LlavaForConditionalGeneration")
    lora = LoRA(rank=2, target_modules=r"model\.language_model\..*\.q_proj")
    adapter = attach(copy.deepcopy(base), Stack([lora, TrainableTokens([3, 5])]))
    stir(adapter.parameters().values())
    save_adapter(adapter, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    old = {key.replace("model.model.language_model", "model.language_model.model"): v for key, v in tensors.items()}
    assert not old.keys() & tensors.keys()
    table = "language_model.model.embed_tokens"
    config = {"target_modules": ["q_proj"], "exclude_modules": r"vision_tower\..*",
              "trainable_token_indices": {table: [3, 5]}}  # fmt: skip
    assert config_in(tmp_path)["trainable_token_indices"] == {"model.language_model.embed_tokens": [3, 5]}
    changed(tmp_path, config, {**dict.fromkeys(tensors), **old})
    again = load_adapter(base, tmp_path)
    ids = torch.tensor([[3, 9, 5, 7]])
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, adapter.model(input_ids=ids).logits)
