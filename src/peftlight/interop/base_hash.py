"""The fingerprint of the base that an adapter was trained on, so that it is not put on another one unnoticed.

Of each frozen tensor at most 65,536 values count, evenly spaced from the first on: a model of 7 B values takes a
moment, and a tensor of up to that size counts whole. A base that was trained further differs in nearly all values.
"""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD
from peftlight.interop.hf.names import SHORT_PREFIX, without_prefix
from peftlight.linear import is_quantized
from peftlight.shards import whole
from peftlight.strategy import Adapter, base_values

_MOST = 1 << 16


@dataclass(frozen=True)
class Fingerprint:
    """What is compared of a base; all None where nothing of it is frozen."""

    dtype: str | None
    """The number format of most of its values: "float32", "bfloat16"; "uint8" or "int8" if layers are quantized."""
    shapes: str | None
    """SHA-256 over the names and shapes of the frozen tensors."""
    weights: str | None
    """SHA-256 over their names, shapes and values; None on the meta device."""


def fingerprint(adapter: Adapter, in_file: Collection[str] = ()) -> Fingerprint:
    """The fingerprint of what the adapter leaves as it is in its model.

    Left out are the deltas of all adapters, what this one trains in place, and what its file of tensors holds in full
    (`in_file`, the names there): a head that is new in each base, for example. Values count as 64-bit numbers, so that
    a vector that a training put into float32 is still the same. What other adapters of the model train in place or have
    merged counts as it was before. Where the model is sharded over processes, all of them have to ask.
    """
    frozen = sorted(_frozen(adapter, in_file))
    if not frozen:
        return Fingerprint(None, None, None)
    sizes: Counter[torch.dtype] = Counter()
    shapes, weights = hashlib.sha256(), hashlib.sha256()
    readable = not any(tensor.is_meta for _, _, tensor in frozen)
    for name, shape, tensor in frozen:
        sizes[tensor.dtype] += prod(shape)
        shapes.update(f"{name} {shape}\n".encode())
        if readable:
            weights.update(f"{name} {shape}\n".encode() + _values(tensor))
    packed = next(
        (module.get_parameter("weight").dtype for module in adapter.model.modules() if is_quantized(module)), None
    )
    dtype = str(packed or sizes.most_common(1)[0][0]).removeprefix("torch.")
    return Fingerprint(dtype, shapes.hexdigest(), weights.hexdigest() if readable else None)


def differs(there: Fingerprint, here: Fingerprint) -> str | None:
    """In what the bases of two fingerprints differ; None where they do not, or where it cannot be known.

    Where the number formats differ, or the base is quantized, its values are rounded in different ways, so that names
    and shapes alone are compared.
    """
    if there.shapes is None or here.shapes is None:
        return None
    if there.shapes != here.shapes:
        return "names or shapes"
    rounded = there.dtype != here.dtype or not _is_float(here.dtype)
    if rounded or there.weights is None or here.weights is None:
        return None
    return "values" if there.weights != here.weights else None


def _is_float(dtype: str | None) -> bool:
    return getattr(torch, dtype or "", torch.int8).is_floating_point


def _frozen(adapter: Adapter, in_file: Collection[str]) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """Name, shape and values of each tensor of the base that is saved with it and that is not the adapter's."""
    model, own = adapter.model, adapter.state()
    saved = model.state_dict(keep_vars=True)
    before = base_values(model)
    held = {id(saved[name]) for key in in_file for name in _names_of(key) if name in saved}
    for named in (model.named_parameters(), model.named_buffers()):
        for name, tensor in named:
            if name in saved and name not in own and id(tensor) not in held and CHILD not in name.split("."):
                yield name, _shape(model, name, tensor), before.get(name, tensor)


def _names_of(key: str) -> tuple[str, ...]:
    """The names that a tensor of a file may have in the model: HF PEFT puts its own words before and into them."""
    plain = key.replace(".base_layer.", ".")
    return plain, without_prefix(plain), plain.removeprefix(SHORT_PREFIX)


def _shape(model: nn.Module, name: str, tensor: Tensor) -> tuple[int, ...]:
    """The tensor's shape; of a linear layer's weight, which may be packed by a quantization, what the layer says."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf == "weight" and isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return tuple(tensor.shape)


def _values(tensor: Tensor) -> bytes:
    flat = whole(tensor.detach()).reshape(-1)
    if len(flat) > _MOST:
        flat = flat[torch.arange(_MOST, device=flat.device) * len(flat) // _MOST]
    if flat.is_complex():
        flat = torch.view_as_real(flat)
    flat = flat.cpu()
    content: bytes = (flat.double() if flat.is_floating_point() else flat.long()).numpy().tobytes()
    return content
