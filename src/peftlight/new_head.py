"""A base's head for other classes: what is said of it, and how a new one takes its place."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftlight.errors import UserError, listed
from peftlight.paths import heads_of, inside

_CHOICE = " To put a new one there and train it: --model.new_head true"


def refuse_other_sizes(
    name: str, model: nn.Module, mismatched: Sequence[tuple[str, Any, Any]], there: Any, may_be_new: bool | None
) -> None:
    """See that tensors of another size are those of a head that gives way to a new one.

    Args:
        name: of the base.
        model: as it is made here; its config says the classes that are asked for.
        mismatched: of each tensor its name, its shape there, and its shape here.
        there: the base's own configuration.
        may_be_new: whether the head gives way; None: it does not, and nobody can choose that it does.

    Raises:
        UserError: they are not.
    """
    heads = heads_of(model)
    body = [each for each in mismatched if not inside(each[0], heads)]
    if not body and (may_be_new or not mismatched):
        return
    shapes = listed(f"{key} is {tuple(had)} there, {tuple(asked)} here" for key, had, asked in body or mismatched)
    if body:
        raise UserError(f"The model {name!r} was made for something else: {shapes}.")
    sizes = f"The model {name!r} has a head for {_classes(there)}, and here are {_classes(getattr(model, 'config', 0))}"
    raise UserError(f"{sizes}: {shapes}.{'' if may_be_new is None else _CHOICE}")


def renew_head(model: nn.Module) -> list[str]:
    """Draw all tensors of the model's head anew, as its class draws those of a new model; returns their names.

    Raises:
        UserError: the model does not say what its head is, or how its tensors are drawn.
    """
    heads, draw = heads_of(model), getattr(model, "_init_weights", None)
    names = [name for name, _ in model.named_parameters() if inside(name, heads)]
    if not names or draw is None:
        raise UserError(f"model.new_head: this {type(model).__name__} does not say which part is its head, or how one "
                        "begins. Give the model as an object with a head of your own.")  # fmt: skip
    with torch.no_grad():
        for path in sorted(heads):
            for module in reversed(list(model.get_submodule(path).modules())):  # as transformers: what is within first
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor._is_hf_initialized = False  # type: ignore[attr-defined]  # else transformers leaves it
                draw(module)
    return names


def other_classes(there: Mapping[int, str] | None, here: Sequence[str]) -> str | None:
    """What is said where a head of the right size has learned to tell other classes apart; None: nothing.

    Args:
        there: the classes of the base's head by number.
        here: those that are asked for, in order.
    """
    names = [str(there[number]) for number in sorted(there)] if there else []
    if len(names) != len(here) or _numbered(names) or _numbered(here) or _same(names, here):
        return None
    fresh = "For a head that is drawn anew: --model.new_head true"
    known, asked = listed(names, 5), listed(here, 5)
    if sorted(map(_plain, names)) == sorted(map(_plain, here)):
        return (f"The base's head has the same classes in another order, {known}, and the data has {asked}: at first "
                f"it says one where it means another. To keep its order: --data.labels [{','.join(names)}] (as the "
                f"data spells them). {fresh}")  # fmt: skip
    return f"The base's head tells other classes apart ({known}), and is trained on from there for {asked}. {fresh}"


def _classes(config: Any) -> str:
    names = getattr(config, "id2label", None) or {}
    in_order = [str(names[number]) for number in sorted(names)]
    return f"{len(in_order)} classes{'' if _numbered(in_order) else f' ({listed(in_order, 5)})'}"


def _numbered(names: Sequence[str]) -> bool:
    """Whether the names are only numbers, as transformers gives them to classes that nobody named."""
    return all(name.removeprefix("LABEL_").isdecimal() for name in names)


def _same(names: Sequence[str], others: Sequence[str]) -> bool:
    return [*map(_plain, names)] == [*map(_plain, others)]


def _plain(name: str) -> str:
    return name.strip().casefold()
