"""What else says how many outputs a head has: its layer, and the model's config."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from peftlight.paths import heads_of, inside

_LABELS = ("id2label", "label2id", "problem_type")
"""What a config of transformers says of classes; their number is the length of `id2label`."""


def tell_sizes(model: nn.Module, before: Mapping[str, Tensor], labels: Mapping[str, Any]) -> dict[str, Any]:
    """Let layers and the model's config say the sizes that the tensors have by now.

    Args:
        model: has the tensors.
        before: by their names what the tensors held before.
        labels: what the config is to say of the classes; without it they are numbered where their number has changed.

    Returns: what the config said of the classes before; nothing where their number and names are as they were.
    """
    sizes = {}
    for name, value in before.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        tensor: Tensor = getattr(module, leaf)
        if tensor.shape == value.shape:
            continue
        if isinstance(module, nn.Linear):
            module.out_features = len(tensor)
        sizes[name] = len(value), len(tensor)
    config: Any = getattr(model, "config", None)
    count = getattr(config, "num_labels", None)
    heads = heads_of(model) if sizes else set()
    new = next((now for name, (was, now) in sizes.items() if was == count and inside(name, heads)), None)
    if new is None and not (before and labels):
        return {}
    return _tell_classes(model, config, config.num_labels if new is None else new, labels)


def classes_said(model: nn.Module) -> dict[str, Any]:
    """What the model's config says of the classes; nothing where it has no classes."""
    config: Any = getattr(model, "config", None)
    return {key: getattr(config, key, None) for key in _LABELS} if hasattr(config, "num_labels") else {}


def _tell_classes(model: Any, config: Any, count: int, labels: Mapping[str, Any]) -> dict[str, Any]:
    said = classes_said(model)
    if 1 in (count, config.num_labels):  # which is a regression; transformers finds anew what many classes are
        config.problem_type = None
    config.num_labels = count
    for key, value in labels.items():
        setattr(config, key, value)
    if hasattr(model, "num_labels"):
        model.num_labels = count
    return said
