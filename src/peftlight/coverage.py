"""Which weight matrices of a model deltas reach, and which they leave out."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from peftlight.errors import listed
from peftlight.linear import is_linear, is_quantized, widths
from peftlight.paths import inside, own_parameters, place_of, starred

_SHOWN = 4
_LAYERS = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Beside linear layers, those whose weight anyone looks for under the layer's own name."""


@dataclass(frozen=True)
class Weights:
    """Weight matrices of one name, the numbers of layers replaced by `*`."""

    name: str
    count: int
    dimensions: int
    """Two for a matrix, three for the experts of a mixture in one tensor, four for images' convolutions."""
    numbers: int
    """How many numbers they hold together."""

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        shape = "" if self.dimensions == 2 else f"{self.dimensions}-D, "
        return f"{times}{self.name} ({shape}{self.numbers:,})"


def uncovered(model: nn.Module, sites: Collection[str], trained: Collection[str]) -> list[Weights]:
    """The weight matrices, of two dimensions and more, that nothing changes; those that hold most come first.

    Args:
        model: the model, with adapters on it or not.
        sites: paths of the modules whose weights deltas change.
        trained: names of the parameters that are trained in place.
    """
    changed = {id(p) for site in sites for p in model.get_submodule(site).parameters(recurse=False)}
    return _grouped(model, (name for name, p in _matrices(model) if id(p) not in changed and name not in trained))


def no_layers(model: nn.Module, skip: Collection[str] = ()) -> list[Weights]:
    """The weight matrices in the model's stacks that belong to no linear layer, embedding or convolution.

    The experts of a mixture that lie in one tensor are such, and those of `nn.MultiheadAttention` and `nn.LSTM`: what
    selects layers passes them by. Those in the modules of `skip` are left out.
    """
    modules = dict(model.named_modules())
    owners = {name: modules[name.rpartition(".")[0]] for name, _ in _matrices(model) if place_of(name)}
    return _grouped(model, (name for name, owner in owners.items()
                            if not (is_linear(owner) or isinstance(owner, _LAYERS) or inside(name, skip))))  # fmt: skip


def share(weights: Iterable[Weights], model: nn.Module) -> str:
    """How much of the model they are and which, in one sentence's part; the smaller ones are only counted."""
    found = list(weights)
    whole = sum(_numbers(model, name, p) for name, p in own_parameters(model))
    held = sum(each.numbers for each in found)
    return f"{held / whole:.1%} of the base's {whole:,} numbers: {listed(map(str, found), _SHOWN)}"


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in own_parameters(model):
        if parameter.squeeze().dim() > 1 or _is_packed(model, name):  # a class token of one row is a vector
            yield name, parameter


def _grouped(model: nn.Module, names: Iterable[str]) -> list[Weights]:
    groups: dict[tuple[str, int], list[int]] = {}
    for name in names:
        parameter = model.get_parameter(name)
        groups.setdefault((starred(name), parameter.dim()), []).append(_numbers(model, name, parameter))
    found = [Weights(name, len(sizes), dimensions, sum(sizes)) for (name, dimensions), sizes in groups.items()]
    return sorted(found, key=lambda each: -each.numbers)


def _is_packed(model: nn.Module, name: str) -> bool:
    path, _, leaf = name.rpartition(".")
    return leaf == "weight" and is_quantized(model.get_submodule(path))


def _numbers(model: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """How many numbers a parameter holds; of a weight that lies packed in bytes, as many as it stands for."""
    if _is_packed(model, name):
        inputs, outputs = widths(model.get_submodule(name.rpartition(".")[0]))
        return inputs * outputs
    return parameter.numel()
