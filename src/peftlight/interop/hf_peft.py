"""LoRA in HF PEFT's files: pure translations, both ways, of the config and of the tensors' names.

A tensor's name there is `base_model.model.` and its path, with `lora_A.weight` for our `deltas.<name>.A`; modules
trained whole are full copies under their own paths, and the bias of an adapted layer is its `base_layer.bias`.
"""

import re
from collections.abc import Collection

from torch import nn

from peftlight.delta import CHILD, Delta
from peftlight.errors import UserError, listed
from peftlight.interop import hf_config
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf_checks import Found, heads_of, misfits, missing_sites, plain_state
from peftlight.interop.hf_targets import HEADS_OF_TASK, paths_of, targets_for, task_of, wrapped
from peftlight.linear import is_conv1d
from peftlight.strategies.lora import FROM_WEIGHT, LoRA
from peftlight.strategies.lora_dora import ConvDoRA, EmbeddingDoRA, LinearDoRA
from peftlight.strategies.lora_layers import ConvLoRA, EmbeddingLoRA, LinearLoRA
from peftlight.strategy import Adapter
from peftlight.targets import pattern_value

PREFIX = "base_model.model."

_PAIR = {"A": "lora_A.weight", "B": "lora_B.weight"}
_TABLES = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
_NORMS = {"m": "lora_magnitude_vector"}
_MATRICES = {
    LinearLoRA: _PAIR,
    ConvLoRA: _PAIR,
    EmbeddingLoRA: _TABLES,
    LinearDoRA: _PAIR | _NORMS,
    ConvDoRA: _PAIR | _NORMS,
    EmbeddingDoRA: _TABLES | _NORMS,
}
_LORA_KEY = re.compile(r"(?P<site>.+)\.lora_(?:embedding_(?P<table>[AB])|(?P<matrix>[AB])\.weight|magnitude_vector)")
_ODD_BIAS = re.compile(r".+\.(modules_to_save|original_module)\.(.+\.)?bias")
"""Keys that HF PEFT writes beside a head's own biases when bias is "all", and does not read."""


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what the adapter does.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    heads = _heads(adapter)
    config = _config(adapter, heads)
    whole = wrapped([*heads, *_implied(config["task_type"])], paths_of(adapter.model, tied_twice=True))
    inside = tuple(f"{path}." for path in whole)
    tensors: Tensors = {}
    for site, delta in adapter.sites.items():
        if f"{site}.".startswith(inside):
            raise UserError(f"HF PEFT trains all of {listed(whole)} whole, so {site} in it can have no adapter there.")
        for ours, theirs in _MATRICES[type(delta)].items():
            tensors[f"{PREFIX}{site}.{theirs}"] = delta.get_parameter(ours).detach()
    for path in whole:
        for key, value in adapter.model.get_submodule(path).state_dict().items():
            if _of_base(key):
                tensors[f"{PREFIX}{path}.{key}"] = value
    for key, value in adapter.state().items():
        if _of_base(key) and not key.startswith(inside):
            tensors[_with_base_layer(key, adapter.sites)] = value
    return config, tensors


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that HF PEFT's files describe, to be put on `model` under `name`.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    hf_config.check_supported(config)
    hf_config.check_kinds(config)
    found = _sorted_out(tensors, model, dora=config.get("use_dora") is True)
    if not found.matrices:
        raise UserError(f"It holds no LoRA tensor that fits this {type(model).__name__}: {listed(tensors, 3)}.")
    entries, implied = hf_config.names(config, "modules_to_save"), _implied(config.get("task_type"))
    strategy = hf_config.recipe(config, found.matrices, targets_for(found.matrices, paths_of(model), entries))
    heads = heads_of(strategy, entries, implied, found, model)
    problems = missing_sites({**config, "modules_to_save": [*entries, *implied]}, found, model)
    problems += misfits(strategy, found, model) + found.unknown
    state, more = plain_state(strategy, heads, found, model)
    if problems + more:
        raise UserError(f"It does not fit this {type(model).__name__}:\n  " + "\n  ".join(problems + more))
    if strategy.init_lora_weights in FROM_WEIGHT:
        _add_starts(strategy, found, model)
    for site, pair in found.matrices.items():
        state.update({f"{site}.{CHILD}.{name}.{matrix}": value for matrix, value in pair.items()})
    return Contents(strategy, heads, state)


def _add_starts(strategy: LoRA, found: Found, model: nn.Module) -> None:
    """Where A and B started: HF PEFT writes only where they are, and decomposes the base again when it reads."""
    for site, matrices in found.matrices.items():
        matrices["A0"], matrices["B0"] = strategy.start_at(site, model.get_submodule(site))


def _implied(task: str | None) -> tuple[str, ...]:
    return HEADS_OF_TASK.get(task or "", ())


def _of_base(key: str) -> bool:
    return CHILD not in key.split(".")


def _heads(adapter: Adapter) -> list[str]:
    """The modules trained whole, and those tied to them: HF PEFT would leave the other end of the tie as it was."""
    modules = dict(adapter.model.named_modules(remove_duplicate=False))
    heads = [name for name in adapter.trained if name in modules]
    trained = {id(parameter) for head in heads for parameter in modules[head].parameters()}
    for path in paths_of(adapter.model, tied_twice=True):
        tied = any(id(parameter) in trained for parameter in modules[path].parameters(recurse=False))
        if tied and not f"{path}.".startswith(tuple(f"{head}." for head in heads)):
            heads.append(path)
    return sorted(heads)


def _config(adapter: Adapter, heads: list[str]) -> Config:
    model, strategy = adapter.model, adapter.strategy
    assert isinstance(strategy, LoRA)
    foreign = {type(delta).__name__ for delta in adapter.sites.values() if type(delta) not in _MATRICES}
    if foreign:
        raise UserError(f"HF PEFT's LoRA has nothing like {listed(sorted(foreign))}.")
    task, paths = task_of(model), paths_of(model)
    if any(f"{site}.".startswith(f"{head}.") for head in wrapped(_implied(task), paths) for site in adapter.sites):
        task = None  # with a task HF PEFT would train the adapted head whole
    ranks = {site: _rank(delta) for site, delta in adapter.sites.items()}
    alphas = {site: pattern_value(strategy.alpha_pattern, site, strategy.alpha) for site in ranks}
    return {
        **hf_config.written(strategy, ranks, alphas),
        "task_type": task,
        "base_model_name_or_path": base_name(model),
        "fan_in_fan_out": all(is_conv1d(model.get_submodule(site)) for site in ranks),
        "target_modules": targets_for(ranks, paths, [*heads, *_implied(task)]),
        "modules_to_save": heads or None,
    }


def base_name(model: nn.Module) -> str:
    """Where the base came from, as far as the model itself knows."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or ""


def _rank(delta: Delta) -> int:
    return delta.get_parameter("A").shape[0]


def _with_base_layer(key: str, sites: Collection[str]) -> str:
    module, _, leaf = key.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{leaf}" if module in sites else PREFIX + key


def _sorted_out(tensors: Tensors, model: nn.Module, dora: bool) -> Found:
    found, base, modules = Found(), model.state_dict(), set(paths_of(model, tied_twice=True))
    for key, value in tensors.items():
        path = key.removeprefix(PREFIX)
        plain = path.replace(".base_layer.", ".")
        matrix = _LORA_KEY.fullmatch(path)
        letter = matrix and (matrix["matrix"] or matrix["table"] or "m")
        if matrix and letter and matrix["site"] in modules and (dora or letter != "m"):
            found.matrices.setdefault(matrix["site"], {})[letter] = value
        elif plain in base:
            found.plain[plain] = value
        elif not _ODD_BIAS.fullmatch(path):
            found.unknown.append(f"unexpected: {key}, for which the model has no place")
    return found
