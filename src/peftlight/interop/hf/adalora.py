"""AdaLoRA in HF PEFT's files: three matrices without `.weight`, cut to the ranks that are left."""

from collections.abc import Collection
from typing import Any

from torch import nn

from peftlight.errors import UserError
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf import frame, renames
from peftlight.interop.hf.checks import Shapes, misshapen
from peftlight.interop.hf.config_fields import check_fields, number
from peftlight.linear import is_linear, widths
from peftlight.strategies.adalora import AdaLoRA
from peftlight.strategy import Adapter

_MATRICES = {matrix: f"lora_{matrix}" for matrix in "AEB"}
_SAME = {
    "init_r": "init_r", "target_r": "target_r", "lora_alpha": "alpha", "lora_dropout": "dropout", "deltaT": "interval",
    "beta1": "beta1", "beta2": "beta2", "orth_reg_weight": "orthogonality",
}  # fmt: skip
"""HF PEFT's fields, and ours that mean the same."""
_DEFAULTS = {
    "init_r": 12, "target_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
    "orth_reg_weight": 0.5,
}  # fmt: skip
"""HF PEFT's, for fields that a file leaves out."""
_SCHEDULE = {"tinit": 0, "tfinal": 0, "total_step": 1}
"""HF PEFT refuses a config without a schedule. In a file the ranks are final, so that nothing of it is used."""
_OTHERS = {
    *_SCHEDULE, "r", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights", "use_rslora", "layers_to_transform",
    "layers_pattern", "megatron_core", "qalora_group_size",
}  # fmt: skip
"""Of these, HF PEFT's AdaLoRA takes heed of the rank pattern, the bias and the choice of layers."""


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what the adapter does.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    strategy = adapter.strategy
    assert isinstance(strategy, AdaLoRA)
    placed = {
        site: {theirs: delta.get_parameter(ours).detach() for ours, theirs in _MATRICES.items()}
        for site, delta in adapter.sites.items()
    }
    config, tensors = frame.written(adapter, placed)
    config |= {"peft_type": "ADALORA", "bias": "none", "fan_in_fan_out": frame.transposed(adapter)}
    config |= {theirs: getattr(strategy, ours) for theirs, ours in _SAME.items()}
    return config | _SCHEDULE | {"r": 8, "rank_pattern": _flags(strategy)}, tensors


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that HF PEFT's files describe, with the ranks they hold, to be put on `model` under `name`.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    config, tensors = renames.translated(config, tensors, model)
    if config.get("bias", "none") != "none":
        raise UserError(f"bias is {config['bias']!r}; AdaLoRA trains no biases here.")
    check_fields(config, {*_SAME, *_OTHERS})
    fields: dict[str, Any] = {ours: number(config, theirs, _DEFAULTS[theirs]) for theirs, ours in _SAME.items()}
    found = frame.found_in(config, tensors, model, {theirs: ours for ours, theirs in _MATRICES.items()})
    expected = _ranks(config, found.matrices, int(fields["init_r"]))
    problems = misshapen(found, model, _MATRICES, lambda site, module: _shapes(module, expected[site]))
    ranks = {site: len(matrices.get("A", ())) for site, matrices in found.matrices.items()}
    strategy = AdaLoRA(**fields, target_modules=frame.targets_of(config, found, model), final_ranks=ranks)
    return frame.contents(config, strategy, found, model, name, _MATRICES, problems)


def _flags(strategy: AdaLoRA) -> dict[str, list[bool]] | None:
    """Which singular values are left, as HF PEFT writes it; only their number in each layer counts to it."""
    ranks, full = strategy.final_ranks, strategy.init_r
    if set(ranks.values()) == {full}:
        return None
    return {f"{site}.lora_E": [True] * rank + [False] * (full - rank) for site, rank in sorted(ranks.items())}


def _ranks(config: Config, sites: Collection[str], full: int) -> dict[str, int]:
    """The rank of each site as the config has it."""
    flags = config.get("rank_pattern") or {}
    if not isinstance(flags, dict) or not all(isinstance(value, list) for value in flags.values()):
        raise UserError(f"rank_pattern is {flags!r}; expected a list of true and false for each layer.")
    return {site: flags[f"{site}.lora_E"].count(True) if f"{site}.lora_E" in flags else full for site in sites}


def _shapes(module: nn.Module, rank: int) -> Shapes | None:
    if not is_linear(module):
        return None
    inputs, outputs = widths(module)
    return {"A": (rank, inputs), "E": (rank, 1), "B": (outputs, rank)}
