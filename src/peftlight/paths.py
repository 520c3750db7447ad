"""The paths of a model's modules: which are its own, which are heads, and where they stand in its stacks of layers."""

import re
from collections.abc import Collection, Iterable, Iterator

from torch import nn


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below the model, without those that adapters brought along."""
    for name, module in model.named_modules():
        if name and "deltas" not in name.split("."):
            yield name, module


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the model, without those that adapters brought along."""
    for name, parameter in model.named_parameters():
        if "deltas" not in name.split("."):
            yield name, parameter


def first_names(model: nn.Module) -> dict[int, str]:
    """Of each parameter and buffer, by identity, the first name that it has in the model."""
    first: dict[int, str] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            first.setdefault(id(tensor), name)
    return first


def input_embedding(model: nn.Module) -> nn.Module | None:
    """What the model says is its embedding of tokens; None where it has none, as models of images, or does not say."""
    return _said(model, "get_input_embeddings")


def output_embedding(model: nn.Module) -> nn.Module | None:
    """What the model says is its output layer over tokens; None where it has none or does not say."""
    return _said(model, "get_output_embeddings")


def _said(model: nn.Module, method: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(model, method, lambda: None)()
    except (AttributeError, NotImplementedError):  # transformers' answer of models without one
        return None
    return found


def heads_of(model: nn.Module) -> set[str]:
    """Paths of the output embedding and of what stands outside the backbone, where the model has one."""
    embedding = output_embedding(model)
    heads = {name for name, module in model.named_modules() if embedding is not None and module is embedding}
    backbone, children = getattr(model, "base_model_prefix", None), {name for name, _ in model.named_children()}
    if backbone in children:
        return heads | (children - {backbone})
    # A model of transformers with its parts at the top (CLIP's classifier, say): heads can be told by name alone.
    return heads | (children & {"classifier", "score", "lm_head", "qa_outputs"} if backbone is not None else set())


def named(names: Iterable[str], entry: str) -> list[str]:
    """Those of the names that are the entry, or end with it at a dot."""
    return [name for name in names if name == entry or name.endswith(f".{entry}")]


def inside(name: str, paths: Collection[str]) -> bool:
    """Whether the name is one of the paths or lies below one."""
    while name and name not in paths:
        name = name.rpartition(".")[0]
    return bool(name)


def place_of(name: str) -> tuple[str, int] | None:
    """The stack that a path goes through and the number of its layer in it, or None."""
    parts = name.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return None if place is None else (".".join(parts[:place]), int(parts[place]))


def starred(name: str) -> str:
    """The path with the numbers of layers replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def end_of(name: str, length: int) -> str:
    """The last `length` parts of a path."""
    return ".".join(name.split(".")[-length:])


def leaf_of(name: str) -> str:
    """The last part of a path; the last two where that is a number."""
    last = name.rpartition(".")[2]
    return end_of(name, 2) if last.isdecimal() else last


def at_end(pattern: str, name: str) -> bool:
    """Whether the regular expression matches the end of the path, at a dot."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None
