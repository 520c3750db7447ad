"""A base with an adapter folded in, written as a folder of plain transformers: config and weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD
from peftlight.errors import UserError, listed
from peftlight.files import as_os_error
from peftlight.interop.contents import Tensors
from peftlight.interop.hf.frame import base_name
from peftlight.interop.tensor_files import check_finite
from peftlight.linear import is_conv1d, weight_of
from peftlight.paths import own_parameters
from peftlight.pretrained import without_remarks
from peftlight.strategy import Adapter, adapters_on

_UNMERGED = ("It can be used beside its base: peftlight predict, generate and chat take the adapter as it is. What is "
             "to be merged has to be trained with a method that changes weights, as LoRA does.")  # fmt: skip
_TIE = "tie_word_embeddings"


@dataclass
class PlainModel:
    """The tensors of a model into which an adapter is folded; the model itself is left as it is."""

    state: Tensors
    """By their names in the bare model. What is neither changed nor of another number format is the model's own."""
    untied: list[str]
    """Names of tensors that were one and now differ."""
    changed: float | None
    """‖W' - W‖ / ‖W‖ over all weights W that a delta changes, in Frobenius norms; None where there is none."""
    lost: float | None
    """‖round(W') - W'‖ / ‖W' - W‖: how large the rounding is beside the change."""


def plain_model(adapter: Adapter, dtype: torch.dtype) -> PlainModel:
    """Fold the adapter in; each weight is computed in float32 at least, and rounded to `dtype` once.

    Tensors that are one in the base stay one if they are equal afterwards.

    Raises:
        UserError: the adapter is off, merged, or cannot be folded; the base is quantized; `dtype` cannot hold a value.
    """
    _check(adapter)
    squares = [0.0, 0.0, 0.0]
    changed: dict[tuple[int, str], Tensor] = {}
    for site in adapter.sites:
        module = adapter.model.get_submodule(site)
        weight, bias = _folded(adapter, site)
        rounded, before = weight.to(dtype), weight_of(module).to(weight.dtype)
        for place, matrix in enumerate((before, weight - before, rounded.to(weight.dtype) - weight)):
            squares[place] += float(matrix.double().square().sum())
        changed[id(module), "weight"] = (rounded.T if is_conv1d(module) else rounded).contiguous()
        if bias is not None:
            changed[id(module), "bias"] = bias.to(dtype)
    state, ties = _state(adapter.model, changed, dtype)
    untied = [name for names in ties for name in _settled(state, names)]
    name = str(dtype).removeprefix("torch.")
    check_finite(state, f"The model cannot be written in {name}, whose largest number is {torch.finfo(dtype).max:.3g}")
    return PlainModel(state, untied, _ratio(squares[1], squares[0]), _ratio(squares[2], squares[1]))


def write_model(adapter: Adapter, plain: PlainModel, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    """Write config and weights of the plain model that `adapter` was folded into; its tensors are used up.

    Raises:
        UserError: transformers refuses to write it.
        OSError: the disk is full, or a file cannot be written.
    """
    with _as_errors_of_the_disk(), without_remarks():
        adapter.model.save_pretrained(folder, state_dict=plain.state, max_shard_size=shard_size)  # type: ignore[operator]
        _config_of(adapter, dtype, bool(plain.untied)).save_pretrained(folder)
    plain.state = {}
    for path in folder.glob("*.safetensors"):  # which safetensors gives to their owner alone
        path.chmod((folder / "config.json").stat().st_mode)


def refuse_quantized_config(config: Any, name: str) -> None:
    """See that the base of this config has plain numbers as weights.

    Raises:
        UserError: they are quantized.
    """
    told = getattr(config, "quantization_config", None)
    if told is None:
        return
    method = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
    raise _is_quantized(name, str(getattr(method, "value", method) or "its config says so"))


def stays_tied(config: Any) -> bool:
    """Whether a model of this config ties its embeddings whatever the config says, as T5 does.

    For T5 the entry has another meaning. transformers keeps such tensors apart if the files hold them with two values.
    """
    return bool(getattr(type(config).from_dict({**config.to_dict(), _TIE: False}), _TIE, False))


def _is_quantized(name: str, how: str) -> UserError:
    return UserError(
        f"The base {name} is quantized ({how}): its weights cannot take up the change without being rounded anew. "
        "Merge into the model in full precision from which it was made: --base NAME --dtype bfloat16"
    )


def _check(adapter: Adapter) -> None:
    model = adapter.model
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"{type(model).__name__} is no model of transformers, so there is no folder format for it.")
    name = base_name(model) or type(model).__name__
    refuse_quantized_config(model.config, name)
    if odd := {p.dtype for _, p in own_parameters(model) if not p.is_floating_point() or p.element_size() < 2}:
        raise _is_quantized(name, listed(sorted(str(dtype).removeprefix("torch.") for dtype in odd)))
    if adapter.merged or not adapter.enabled:
        state = "merged already; unmerge it" if adapter.merged else "switched off; enable it"
        raise UserError(f"The adapter {adapter.name!r} is {state} before writing the merged model.")
    if others := sorted(other.name for other in adapters_on(model) if other.enabled and other is not adapter):
        raise UserError(f"{listed(others)} is on too; what is merged is {adapter.name!r} alone. Switch it off first.")


def _folded(adapter: Adapter, site: str) -> tuple[Tensor, Tensor | None]:
    try:
        return adapter.folded(site)
    except UserError as error:
        methods = [type(part.strategy).__name__ for part in adapter.parts]
        raise UserError(f"{error}\n  The adapter is one of {listed(methods)}. {_UNMERGED}") from None


def _state(
    model: nn.Module, changed: dict[tuple[int, str], Tensor], dtype: torch.dtype
) -> tuple[Tensors, list[list[str]]]:
    """The bare model's tensors, and the groups of names that are one tensor in it."""
    state: Tensors = {}
    cast: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        path, _, leaf = name.rpartition(".")
        if CHILD in name.split("."):
            continue
        new = changed.get((id(model.get_submodule(path)), leaf))
        if new is None and id(tensor) not in cast:
            cast[id(tensor)] = tensor.detach().to(dtype if tensor.is_floating_point() else tensor.dtype)
        state[name] = cast[id(tensor)] if new is None else new
        names.setdefault(id(tensor), []).append(name)
    return state, [group for group in names.values() if len(group) > 1]


def _settled(state: Tensors, names: list[str]) -> list[str]:
    """Let the tied tensors of these names be one if they are equal, else each its own; returns the names then."""
    first = state[names[0]]
    if all(state[name] is first or torch.equal(state[name], first) for name in names):
        state.update(dict.fromkeys(names, first))
        return []
    state.update({name: state[name].clone() for name in names})
    return names


def _config_of(adapter: Adapter, dtype: torch.dtype, untied: bool) -> Any:
    config: Any = copy.deepcopy(adapter.model.config)
    for each in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        if each is not None:
            each.dtype = str(dtype).removeprefix("torch.")
    if untied and getattr(config, _TIE, False):
        setattr(config, _TIE, stays_tied(config))
    return config


def _ratio(of: float, to: float) -> float | None:
    """The square root of the quotient."""
    return (of / to) ** 0.5 if to else None


@contextmanager
def _as_errors_of_the_disk() -> Iterator[None]:
    """transformers and safetensors have errors of their own for a full disk, and for what they refuse."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        cause = as_os_error(error)
        if cause is error:
            raise UserError(f"transformers cannot write this model: {type(error).__name__}: {error}") from error
        raise cause from error
