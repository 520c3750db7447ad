"""Names in files that were made with transformers 4, for models that are built otherwise since transformers 5.

Such a file speaks of the older names in its tensors and, as ends of paths or regular expressions, in its config. So
the model's modules are given their older names, the config is read in these, and what it selects is put down by the
names of today.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from peftlight.interop.contents import Config, Tensors
from peftlight.interop.hf.config_fields import check_feed_forward, check_kinds, check_pattern, names
from peftlight.interop.hf.names import PREFIX
from peftlight.interop.hf.targets import is_feed_forward, paths_of, selected, wrapped
from peftlight.paths import at_end

_Rules = tuple[tuple[str, str], ...]

_QKV = ((r"\bq_proj\b", "query"), (r"\bk_proj\b", "key"), (r"\bv_proj\b", "value"))
_OUTPUT = ((r"\battention\.o_proj\b", "attention.output.dense"),)
_MLP = ((r"\bmlp\.fc1\b", "intermediate.dense"), (r"\bmlp\.fc2\b", "output.dense"))
_TOWER = r"(?=(?:embeddings|encoder|pre_layrnorm|post_layernorm|final_layer_norm|head)\b)"

_OLDER: tuple[_Rules, ...] = (
    # ViT, DeiT, BEiT, AST, I-JEPA, ViT-MAE, ViT-MSN, ViViT
    ((r"\blayers\.(?=\d)", "encoder.layer."), (r"\battention\.(?=[qkv]_proj)", "attention.attention."),
     *_QKV, *_OUTPUT, *_MLP),
    # DINOv2
    ((r"\battention\.(?=[qkv]_proj)", "attention.attention."), *_QKV, *_OUTPUT),
    # Swin
    ((r"\battention\.(?=[qkv]_proj)", "attention.self."), *_QKV, *_OUTPUT, *_MLP),
    # LLaVA and its relatives, Gemma 3, PaliGemma, Mllama, Qwen2-Audio: up to transformers 4.51
    ((r"^lm_head\b", "language_model.lm_head"), (r"^model\.language_model\b", "language_model.model"),
     (rf"^model\.vision_tower\.{_TOWER}", "vision_tower.vision_model."),
     (r"^model\.(?=(?:vision_tower|vision_model|image_tower|video_tower|audio_tower|multi_modal_projector)\b)", "")),
    # the same, from transformers 4.52 on
    ((rf"\bvision_tower\.{_TOWER}", "vision_tower.vision_model."),),
    # Qwen2-VL, Qwen2.5-VL: up to transformers 4.51
    ((r"^model\.language_model\b", "model"), (r"^model\.visual\b", "visual")),
    # the text and the image part of CLIP, SigLIP and their relatives, alone
    ((rf"^{_TOWER}", "text_model."),),
    ((rf"^{_TOWER}", "vision_model."),),
    # GPT-NeoX
    ((r"^lm_head\b", "embed_out"),),
)  # fmt: skip
"""For each kind of model, what makes a name of transformers 4 out of one of today; rules apply one after another."""


def translated(config: Config, tensors: Tensors, model: nn.Module) -> tuple[Config, Tensors]:
    """The config and the tensors by the names of the model, where they have older ones that the model has not.

    Raises:
        UserError: the config's fields that select modules hold values of the wrong kind.
    """
    paths = paths_of(model, tied_twice=True)
    known, best = set(paths), 0
    today: dict[str, str] = {}
    for rules in _OLDER:
        older = {_older(rules, path): path for path in paths}
        older = {old: path for old, path in older.items() if old not in known}
        if (hits := sum(_renamed(key, older, known) != key for key in tensors)) > best:
            today, best = older, hits
    if not today:
        return config, tensors
    check_kinds(config)
    renamed = {_renamed(key, today, known): value for key, value in tensors.items()}
    then = {path: path for path in paths} | {path: old for old, path in today.items()}
    return _config(config, then, lambda name: _renamed(name, today, known)), renamed


def _older(rules: _Rules, path: str) -> str:
    for pattern, replacement in rules:
        path = re.sub(pattern, replacement, path)
    return path


def _renamed(key: str, today: Mapping[str, str], known: set[str]) -> str:
    """The key with the path that it begins with exchanged, unless the model has that."""
    prefix = PREFIX if key.startswith(PREFIX) else ""
    path, rest = key.removeprefix(PREFIX), ""
    while path and path not in known:
        if path in today:
            return f"{prefix}{today[path]}{rest}"
        path, _, leaf = path.rpartition(".")
        rest = f".{leaf}{rest}"
    return key


def _config(config: Config, then: Mapping[str, str], renamed: Callable[[str], str]) -> Config:
    """The config in the names of today; `then` are the older names by those."""
    new = dict(config)
    if config.get("target_modules") and config["target_modules"] != "all-linear":
        new["target_modules"] = [path for path, old in then.items() if selected(config, [old])]
        new["exclude_modules"] = new["layers_to_transform"] = new["layers_pattern"] = None
    entries = names(config, "modules_to_save")
    whole = {entry: [path for path, old in then.items() if wrapped([entry], [old])] for entry in entries}
    new["modules_to_save"] = [path for entry in entries for path in whole[entry] or [entry]]
    for field in ("rank_pattern", "alpha_pattern"):
        if isinstance(config.get(field), dict):
            new[field] = _patterns(field, config[field], then, renamed)
    if inner := config.get("feedforward_modules"):
        check_feed_forward(inner)
        new["feedforward_modules"] = [path for path, old in then.items() if is_feed_forward(inner, old)]
    if isinstance(tokens := config.get("trainable_token_indices"), dict):
        new["trainable_token_indices"] = {renamed(name): value for name, value in tokens.items()}
    return new


def _patterns(
    field: str, patterns: dict[str, Any], then: Mapping[str, str], renamed: Callable[[str], str]
) -> dict[str, Any]:
    """Each path with the value of the first pattern that matches it; AdaLoRA's name the tensors E themselves."""
    exact = {renamed(key): value for key, value in patterns.items() if key.endswith(".lora_E")}
    others = [key for key in patterns if key not in exact]
    for pattern in others:
        check_pattern(field, pattern)
    for path, old in then.items():
        if found := [pattern for pattern in others if at_end(pattern, old)]:
            exact[f"^{re.escape(path)}"] = patterns[found[0]]
    return exact
