"""Trainable tokens in HF PEFT's files: alone, or beside a LoRA as its `trainable_token_indices`.

The rows stand there in place of those of the table. HF PEFT trains no head beside tokens alone; with a head they are
written beside a LoRA of zeros. Alone they are written once for each module that is tied to the embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from peftlight.delta import CHILD, Delta
from peftlight.errors import UserError, listed
from peftlight.interop import own_format
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf import frame, lora, renames
from peftlight.interop.hf.checks import Found
from peftlight.interop.hf.config_fields import check_fields
from peftlight.interop.hf.names import PREFIX
from peftlight.interop.hf.targets import paths_of, wrapped
from peftlight.strategies.lora import LoRA
from peftlight.strategies.stack import Stack
from peftlight.strategies.trainable_tokens import Rows, TiedRows, TokenRows, TrainableTokens
from peftlight.strategy import Adapter

_ALONE = "trainable_tokens_delta"
_BESIDE_LORA = "token_adapter.trainable_tokens_delta"
_FIELD = "trainable_token_indices"


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what the adapter does; our own format if none do so.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    strategy = adapter.strategy
    assert isinstance(strategy, TrainableTokens)
    carrier = replace(adapter, strategy=LoRA(rank=1, alpha=1), sites=lora.empty(adapter))
    whole = frame.copied_whole(adapter)
    if not _ties_are_theirs(adapter.sites, adapter.model) or (whole and not carrier.sites):
        return own_format.to_own(adapter)
    if whole:
        return _beside(carrier, adapter.sites, strategy)
    placed = {site: {_ALONE: rows.values.detach()} for site, rows in _first_sites(adapter.sites).items()}
    config, tensors = frame.written(adapter, placed)
    del config["modules_to_save"]
    for site, delta in adapter.sites.items():
        tensors[f"{PREFIX}{site}.{_ALONE}"] = _rows(delta).values.detach()
    return config | {"peft_type": "TRAINABLE_TOKENS", "token_indices": strategy.token_indices}, tensors


def stack_to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """A LoRA and trainable tokens as HF PEFT's LoRA with `trainable_token_indices`; other stacks in our own format.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    parts = adapter.strategy.parts(adapter)
    if [type(part.strategy) for part in parts] != [LoRA, TrainableTokens]:
        return own_format.to_own(adapter)
    lora, tokens = parts
    assert isinstance(tokens.strategy, TrainableTokens)
    if lora.sites.keys() & tokens.sites.keys() or not _ties_are_theirs(tokens.sites, adapter.model):
        return own_format.to_own(adapter)
    return _beside(replace(adapter, strategy=lora.strategy, sites=lora.sites), tokens.sites, tokens.strategy)


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The trainable tokens that HF PEFT's files describe, to be put on `model` under `name`.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    config, tensors = renames.translated(config, tensors, model)
    check_fields(config, {"token_indices", "init_weights"})
    found = frame.found_in(config, tensors, model, {_ALONE: "values"})
    strategy = _strategy(_indices("token_indices", config.get("token_indices")), found, model)
    sites = dict(strategy.deltas(model))
    lacking = [f"missing: {_ALONE} of {site}" for site in sorted(sites.keys() - found.matrices)]
    heads, state = frame.checked(config, found, model, {"values": _ALONE}, [*_misfits(found, sites), *lacking])
    return Contents(strategy, heads, state | _state(sites, found, f"{name}.rows.values"))


def with_lora_from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The LoRA and the tokens that HF PEFT's files describe, or the tokens alone where the LoRA is of zeros.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    own = {key: value for key, value in tensors.items() if key.endswith(f".{_BESIDE_LORA}")}
    if not own:
        raise UserError(f"{_FIELD} is {config[_FIELD]!r}, but the file has no rows for these tokens.")
    rest = {key: value for key, value in tensors.items() if key not in own}
    carrier = lora.from_peft({key: value for key, value in config.items() if key != _FIELD}, rest, model, name)
    found = frame.found_in(config, own, model, {_BESIDE_LORA: "values"})
    indices, tables = _tables(config[_FIELD])
    strategy = _strategy(indices, found, model)
    sites = dict(strategy.deltas(model))
    named = wrapped(tables, paths_of(model)) if tables else list(dict(TrainableTokens(indices).deltas(model)))
    problems = [*_misfits(found, sites), *(f"missing: {_BESIDE_LORA} of {s}" for s in named if s not in sites)]
    problems += [f"{_FIELD} names {table}, which is not there" for table in tables if not wrapped([table], named)]
    if problems + found.unknown:
        raise UserError(f"It does not fit this {type(model).__name__}:\n  " + "\n  ".join(problems + found.unknown))
    if lora.is_empty(rest) and config.get("bias", "none") == "none":
        base = {key: value for key, value in carrier.state.items() if CHILD not in key.split(".")}
        return Contents(strategy, carrier.modules_to_train, base | _state(sites, found, f"{name}.rows.values"))
    old, new = f".{CHILD}.{name}.", f".{CHILD}.{name}.0."
    state = {key.replace(old, new, 1): value for key, value in carrier.state.items()}
    state |= _state(sites, found, f"{name}.1.rows.values")
    return Contents(Stack([carrier.strategy, strategy]), carrier.modules_to_train, state)


def _beside(carrier: Adapter, sites: Mapping[str, Delta], tokens: TrainableTokens) -> tuple[Config, Tensors]:
    config, tensors = lora.to_peft(carrier)
    first = _first_sites(sites)
    tensors |= {f"{PREFIX}{site}.{_BESIDE_LORA}": rows.values.detach() for site, rows in first.items()}
    return config | {_FIELD: dict.fromkeys(first, tokens.token_indices)}, tensors


def _rows(delta: Delta) -> Rows:
    assert isinstance(delta, TokenRows | TiedRows)
    return delta.rows


def _first_sites(sites: Mapping[str, Delta]) -> dict[str, Rows]:
    """Of the modules that share rows, the first, which is the one that keeps them in a state."""
    first: dict[int, str] = {}
    for site, delta in sites.items():
        first.setdefault(id(_rows(delta)), site)
    return {site: _rows(sites[site]) for site in first.values()}


def _ties_are_theirs(sites: Mapping[str, Delta], model: nn.Module) -> bool:
    """Whether HF PEFT changes what is tied to a table as we do: only by the model's config, and without biases."""
    tied = sites.keys() - _first_sites(sites).keys()
    by_config = getattr(getattr(model, "config", None), "tie_word_embeddings", False) is True
    return not tied or (by_config and all(getattr(model.get_submodule(t), "bias", None) is None for t in tied))


def _strategy(indices: list[int], found: Found, model: nn.Module) -> TrainableTokens:
    """Tokens of the tables that the file holds, of tied ones the first."""
    tables: dict[int, str] = {}
    for path, module in model.named_modules():
        if path in found.matrices:
            tables.setdefault(id(getattr(module, "weight", module)), path)
    return TrainableTokens(indices, list(tables.values()))


def _misfits(found: Found, sites: Mapping[str, Delta]) -> list[str]:
    wrong = [f"unexpected: rows of {site}, which is tied to no table" for site in sorted(found.matrices.keys() - sites)]
    for site in sorted(found.matrices.keys() & sites.keys()):
        value, own = found.matrices[site]["values"], _rows(sites[site]).values
        if value.shape != own.shape:
            wrong.append(f"the rows of {site} have shape {tuple(value.shape)}; the model and the config need "
                         f"{tuple(own.shape)}")  # fmt: skip
    first: dict[int, str] = {}
    for site in (site for site in sites if site in found.matrices):
        other = first.setdefault(id(_rows(sites[site])), site)
        if not torch.equal(found.matrices[site]["values"], found.matrices[other]["values"]):
            wrong.append(f"{site} and {other} are tied in this model, but their rows differ in the file")
    return sorted(wrong)


def _state(sites: Mapping[str, Delta], found: Found, name: str) -> Tensors:
    """The rows under the name that they have in the model: at the first of the modules that share them."""
    held = {id(_rows(sites[site])): own["values"] for site, own in found.matrices.items()}
    return {f"{site}.{CHILD}.{name}": held[id(rows)] for site, rows in _first_sites(sites).items()}


def _tables(value: Any) -> tuple[list[int], list[str]]:
    """The tokens, and the names of the tables they are in, none for the input embedding."""
    if not isinstance(value, dict):
        return _indices(_FIELD, value), []
    lists: Sequence[list[int]] = [_indices(_FIELD, indices) for indices in value.values()]
    if any(indices != lists[0] for indices in lists):
        raise UserError(f"{_FIELD} names other tokens for each of {listed(value)}; one list for all can be read.")
    return lists[0], list(value)


def _indices(field: str, value: Any) -> list[int]:
    if not isinstance(value, list) or any(not isinstance(index, int) or isinstance(index, bool) for index in value):
        raise UserError(f"{field} is {value!r}; expected a list of the numbers of tokens.")
    return value
