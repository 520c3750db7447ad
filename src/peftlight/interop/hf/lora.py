"""LoRA in HF PEFT's files: pure translations, both ways, of the config and of the tensors' names."""

from collections.abc import Collection

import torch
from torch import nn

from peftlight.delta import Delta
from peftlight.errors import UserError, listed
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf import config_fields, frame
from peftlight.interop.hf.checks import Found, Shapes, misshapen
from peftlight.linear import is_linear, widths
from peftlight.paths import inside, own_modules, own_parameters
from peftlight.strategies.lora import FROM_WEIGHT, LoRA
from peftlight.strategies.lora_dora import ConvDoRA, EmbeddingDoRA, LinearDoRA
from peftlight.strategies.lora_layers import ConvLoRA, EmbeddingLoRA, LinearLoRA, plain_lora
from peftlight.strategy import Adapter
from peftlight.targets import pattern_value

_PAIR = {"A": "lora_A.weight", "B": "lora_B.weight"}
_TABLES = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
_NORMS = {"m": "lora_magnitude_vector"}
_MATRICES: dict[type, dict[str, str]] = {
    LinearLoRA: _PAIR,
    ConvLoRA: _PAIR,
    EmbeddingLoRA: _TABLES,
    LinearDoRA: _PAIR | _NORMS,
    ConvDoRA: _PAIR | _NORMS,
    EmbeddingDoRA: _TABLES | _NORMS,
}
_SHORT = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}
"""Names for messages, whatever the kind of layer."""


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what the adapter does.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    strategy, sites = adapter.strategy, adapter.sites
    assert isinstance(strategy, LoRA)
    foreign = {type(delta).__name__ for delta in sites.values() if type(delta) not in _MATRICES}
    if foreign:
        raise UserError(f"HF PEFT's LoRA has nothing like {listed(sorted(foreign))}.")
    placed = {
        site: {theirs: delta.get_parameter(ours).detach() for ours, theirs in _MATRICES[type(delta)].items()}
        for site, delta in sites.items()
    }
    config, tensors = frame.written(adapter, placed)
    ranks = {site: len(delta.get_parameter("A")) for site, delta in sites.items()}
    alphas = {site: pattern_value(strategy.alpha_pattern, site, strategy.alpha) for site in ranks}
    config |= config_fields.written(strategy, ranks, alphas)
    return config | {"fan_in_fan_out": frame.transposed(adapter)}, tensors


def from_peft(
    config: Config, tensors: Tensors, model: nn.Module, name: str = "default", biases: Collection[str] | None = None
) -> Contents:
    """The adapter that HF PEFT's files describe, to be put on `model` under `name`.

    `biases` are the parameters of the base that the file trains, where the config's `bias` does not say it.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    config_fields.check_supported(config)
    needed = _PAIR | (_NORMS if config.get("use_dora") is True else {})
    parts = {theirs: ours for ours, theirs in [*needed.items(), *_TABLES.items()]}
    found = frame.found_in(config, tensors, model, parts)
    strategy = config_fields.recipe(config, found.matrices, frame.targets_of(config, found, model))
    short = {ours: _SHORT[ours] for ours in needed}
    problems = misshapen(found, model, short, lambda site, module: _shapes(strategy, site, module))
    biases = _biases(strategy, found, model) if biases is None else biases
    contents = frame.contents(config, strategy, found, model, name, short, problems, biases)
    if strategy.init_lora_weights in FROM_WEIGHT:
        contents.state.update(_starts(strategy, found, model, name))
    return contents


def empty(adapter: Adapter) -> dict[str, Delta]:
    """A LoRA of zeros on one linear layer outside the heads: with it HF PEFT reads what else its files train.

    There is none where the model has no such layer.
    """
    model, whole = adapter.model, frame.copied_whole(adapter)
    for site, module in own_modules(model):
        above = model.get_submodule(site.rpartition(".")[0])
        if is_linear(module) and not inside(site, whole) and not isinstance(above, nn.MultiheadAttention):
            inputs, outputs = widths(module)
            return {site: plain_lora(torch.zeros(1, inputs), torch.zeros(outputs, 1), 1.0, 0.0)}
    return {}


def is_empty(tensors: Tensors) -> bool:
    """Whether the LoRA in a file is nothing but zeros, which no training leaves or could ever leave behind."""
    matrices = [value for key, value in tensors.items() if ".lora_" in key]
    return bool(matrices) and not any(value.any() for value in matrices)


def _starts(strategy: LoRA, found: Found, model: nn.Module, name: str) -> Tensors:
    """Where A and B started: HF PEFT writes only where they are, and decomposes the base again when it reads."""
    starts: Tensors = {}
    for site in found.matrices:
        A0, B0 = strategy.start_at(site, model.get_submodule(site))
        starts |= {frame.key_of(site, name, "A0"): A0, frame.key_of(site, name, "B0"): B0}
    return starts


def _shapes(strategy: LoRA, site: str, module: nn.Module) -> Shapes | None:
    rank = pattern_value(strategy.rank_pattern, site, strategy.rank)
    if is_linear(module):
        inputs, outputs = widths(module)
        return {"A": (rank, inputs), "B": (outputs, rank), "m": (outputs,)}
    if isinstance(module, nn.Embedding):
        dim = module.embedding_dim
        return {"A": (rank, module.num_embeddings), "B": (dim, rank), "m": (dim,)}
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        ones = (1,) * len(module.kernel_size)
        return {
            "A": (rank, module.in_channels, *module.kernel_size),
            "B": (module.out_channels, rank // module.groups, *ones),
            "m": (1, module.out_channels, *ones),
        }
    return None


def _biases(strategy: LoRA, found: Found, model: nn.Module) -> list[str]:
    """The biases of the base that the strategy trains."""
    biases = [key for key, _ in own_parameters(model) if key.rpartition(".")[2] == "bias"]
    if strategy.bias == "lora_only":
        return [key for key in biases if key.rpartition(".")[0] in found.matrices]
    return biases if strategy.bias == "all" else []
