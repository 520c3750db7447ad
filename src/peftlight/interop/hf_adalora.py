"""AdaLoRA in HF PEFT's files.

There an AdaLoRA is a LoRA with a third matrix and with more fields in its config. So heads, targets and the base's
tensors are translated as those of a LoRA on the same layers, and only what is AdaLoRA's own is exchanged here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD, Delta
from peftlight.errors import UserError
from peftlight.interop import hf_peft
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.linear import is_linear, widths
from peftlight.strategies.adalora import AdaLoRA
from peftlight.strategies.lora import LinearLoRA, LoRA
from peftlight.strategy import Adapter

_KEY = re.compile(r"(?:base_model\.model\.)?(?P<site>.+)\.lora_(?P<matrix>[AEB])")
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
_OWN = {*_SAME, *_SCHEDULE, "rank_pattern", "alpha_pattern"} - {"lora_alpha", "lora_dropout"}
"""Fields that a LoRA has not, or that mean something else there; HF PEFT's AdaLoRA takes no heed of alpha_pattern."""


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what the adapter does.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    strategy = adapter.strategy
    assert isinstance(strategy, AdaLoRA)
    with torch.random.fork_rng(devices=[]):  # the stand-ins draw weights that nobody reads
        stand_ins: dict[str, Delta] = {site: LinearLoRA((1, 1), (1, 1), 1.0, 0.0) for site in adapter.sites}
    config, tensors = hf_peft.to_peft(replace(adapter, strategy=LoRA(rank=1), sites=stand_ins))
    for site, delta in adapter.sites.items():
        path = f"{hf_peft.PREFIX}{site}.lora_"
        del tensors[f"{path}A.weight"], tensors[f"{path}B.weight"]
        tensors.update({path + matrix: delta.get_parameter(matrix).detach() for matrix in "AEB"})
    config |= {theirs: getattr(strategy, ours) for theirs, ours in _SAME.items()}
    return config | _SCHEDULE | {"peft_type": "ADALORA", "r": 8, "rank_pattern": _flags(strategy)}, tensors


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that HF PEFT's files describe, with the ranks they hold, to be put on `model` under `name`.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    if config.get("bias", "none") != "none":
        raise UserError(f"bias is {config['bias']!r}; AdaLoRA trains no biases here.")
    numbers = {theirs: _number(config, theirs) for theirs in _SAME}
    sites: dict[str, dict[str, Tensor]] = {}
    rest = dict(tensors)
    for key in tensors:
        if match := _KEY.fullmatch(key):
            sites.setdefault(match["site"], {})[match["matrix"]] = rest.pop(key)
    _check(sites, _ranks(config, sites, int(numbers["init_r"])), model)
    for site, matrices in sites.items():
        rest[f"{site}.lora_A.weight"] = matrices["A"].new_zeros(1, matrices["A"].shape[1])
        rest[f"{site}.lora_B.weight"] = matrices["B"].new_zeros(matrices["B"].shape[0], 1)
    as_lora = {field: value for field, value in config.items() if field not in _OWN}
    contents = hf_peft.from_peft({**as_lora, "peft_type": "LORA", "r": 1}, rest, model, name)
    assert isinstance(contents.strategy, LoRA)
    ranks = {site: len(matrices["A"]) for site, matrices in sites.items()}
    fields: dict[str, Any] = {ours: numbers[theirs] for theirs, ours in _SAME.items()}
    strategy = AdaLoRA(**fields, target_modules=contents.strategy.target_modules, final_ranks=ranks)
    state = {
        f"{site}.{CHILD}.{name}.{matrix}": value for site, found in sites.items() for matrix, value in found.items()
    }
    return replace(contents, strategy=strategy, state=contents.state | state)


def _flags(strategy: AdaLoRA) -> dict[str, list[bool]] | None:
    """Which singular values are left, as HF PEFT writes it; only their number in each layer counts to it."""
    ranks, full = strategy.final_ranks, strategy.init_r
    if set(ranks.values()) == {full}:
        return None
    return {f"{site}.lora_E": [True] * rank + [False] * (full - rank) for site, rank in sorted(ranks.items())}


def _number(config: Config, field: str) -> float:
    value = config.get(field, _DEFAULTS[field])
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"{field} is {value!r}; expected a number.")
    return value


def _ranks(config: Config, sites: Iterable[str], full: int) -> dict[str, int]:
    """The rank of each site as the config has it."""
    flags = config.get("rank_pattern") or {}
    if not isinstance(flags, dict) or not all(isinstance(value, list) for value in flags.values()):
        raise UserError(f"rank_pattern is {flags!r}; expected a list of true and false for each layer.")
    return {site: sum(flags[f"{site}.lora_E"]) if f"{site}.lora_E" in flags else full for site in sites}


def _check(sites: Mapping[str, Mapping[str, Tensor]], ranks: Mapping[str, int], model: nn.Module) -> None:
    modules, problems = dict(model.named_modules(remove_duplicate=False)), []
    for site, matrices in sites.items():
        problems += [f"missing: lora_{matrix} of {site}" for matrix in "AEB" if matrix not in matrices]
        module, rank = modules.get(site), ranks[site]
        if module is None or not is_linear(module):
            what = "no module of the model" if module is None else f"of the class {type(module).__name__}"
            problems.append(f"{site} is {what}; AdaLoRA is for linear layers here")
            continue
        inputs, outputs = widths(module)
        shapes = {"A": (rank, inputs), "E": (rank, 1), "B": (outputs, rank)}
        problems += [
            f"lora_{matrix} of {site} has shape {tuple(value.shape)}; the model and rank {rank} of the config need "
            f"{shapes[matrix]}"
            for matrix, value in matrices.items()
            if value.shape != shapes[matrix]
        ]
    if problems:
        raise UserError(f"It does not fit this {type(model).__name__}:\n  " + "\n  ".join(problems))
