"""Prompt tuning and P-tuning in HF PEFT's files: pure translations, both ways.

An adapter that is read computes as HF PEFT does (`compat: peft`), unless a record beside it says that it was trained
by our conventions: see `as_recorded`. What is written by our conventions gives the real tokens HF PEFT's numbers, where
rows are not padded on the left: there HF PEFT puts the virtual tokens before the padding.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftlight.delta import CHILD
from peftlight.interop import own_format
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf.prompt_learning import (
    Hints,
    check,
    differing,
    read,
    recorded_beside,
    submodules,
    task_for,
    written,
)
from peftlight.paths import input_embedding
from peftlight.strategies.prompt import PromptTuning
from peftlight.strategy import Adapter
from peftlight.virtual_tokens import DecoderSeesThem, VirtualTokens

_HINTS: dict[str, Hints] = {
    "PROMPT_TUNING": {
        "prompt_tuning_init": str, "prompt_tuning_init_text": str, "tokenizer_name_or_path": str,
        "tokenizer_kwargs": dict,
    },
    "P_TUNING": {
        "encoder_reparameterization_type": str, "encoder_hidden_size": int, "encoder_num_layers": int,
        "encoder_dropout": float,
    },
}  # fmt: skip
"""Fields about how the virtual tokens were made, which no longer matters."""


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what a finished adapter does; ours where it cannot.

    A P-tuning is a prompt tuning once its network is left out, and is written as one.
    """
    strategy = adapter.strategy
    assert isinstance(strategy, PromptTuning)
    if not _has_equal(adapter, strategy):
        return own_format.to_own(adapter)
    prompt = adapter.state()[_key(adapter.sites, adapter.name)]
    count, (rows, width) = strategy.num_virtual_tokens, prompt.shape
    unread = prompt.new_zeros(count * submodules(task_for(adapter.model)) - rows, width)  # HF PEFT's for a decoder
    sizes = {"num_virtual_tokens": count, "token_dim": width}
    config, tensors = written(adapter, "PROMPT_TUNING", torch.cat([prompt, unread]), sizes)
    return {**config, "prompt_tuning_init": "RANDOM"}, tensors


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that HF PEFT's files describe, to be put on `model` under `name`.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    parts = read(config, tensors, model, _HINTS[config["peft_type"]], submodules(task_for(model)))
    strategy, columns = PromptTuning(parts.count, init="random", compat="peft"), parts.table.shape[1]
    key, width = _place(strategy, model, name)
    if columns != width:
        parts.problems.append(f"prompt_embeddings has {columns} columns; the model's embeddings have {width}")
    parts.problems += differing(config, {"token_dim": width})
    if _trains_embeddings(model, parts.heads):
        parts.problems.append("modules_to_save has the input embeddings, whose trained copy HF PEFT does not use here")
    check(parts.problems, model)
    return Contents(strategy, parts.heads, {**parts.state, key: parts.table})


def as_recorded(contents: Contents, spec: Mapping[str, Any], model: nn.Module, name: str = "default") -> Contents:
    """What `from_peft` gave, by the conventions of the strategy that our record beside the files names.

    Raises:
        UserError: the record is of another adapter.
    """
    strategy = contents.strategy
    assert isinstance(strategy, PromptTuning)
    recorded = recorded_beside(strategy, spec)
    (old, _), (new, _) = _place(strategy, model, name), _place(recorded, model, name)
    state = dict(contents.state)
    rows = state.pop(old)
    kept = len(rows) if recorded.compat else recorded.num_virtual_tokens
    return replace(contents, strategy=recorded, state={**state, new: rows[:kept]})


def _has_equal(adapter: Adapter, strategy: PromptTuning) -> bool:
    """Whether HF PEFT can compute the same.

    By our conventions a classifier takes the first real token, and finds the last one behind which padding begins; HF
    PEFT's takes the first virtual token, and the last of all.
    """
    task = task_for(adapter.model)
    if task is None or _trains_embeddings(adapter.model, adapter.trained):
        return False
    plain = all(isinstance(delta, VirtualTokens | DecoderSeesThem) for delta in adapter.sites.values())
    return strategy.compat == "peft" or (plain and task != "SEQ_CLS")


def _trains_embeddings(model: nn.Module, trained: list[str]) -> bool:
    table = input_embedding(model)
    embeddings = {id(parameter) for parameter in table.parameters()} if table is not None else set()
    inside = tuple(f"{entry}." for entry in trained)
    named = model.named_parameters(remove_duplicate=False)
    return any(id(parameter) in embeddings for key, parameter in named if key in trained or key.startswith(inside))


def _place(strategy: PromptTuning, model: nn.Module, name: str) -> tuple[str, int]:
    """The name that the virtual tokens will have in the model, and their width."""
    with torch.random.fork_rng(devices=[]):
        sites = dict(strategy.deltas(model))
    (delta,) = (delta for delta in sites.values() if isinstance(delta, VirtualTokens))
    return _key(sites, name), delta.entrance.width


def _key(sites: Mapping[str, nn.Module], name: str) -> str:
    (site,) = (site for site, delta in sites.items() if isinstance(delta, VirtualTokens))
    return f"{site}.{CHILD}.{name}.prompt.weight".lstrip(".")
