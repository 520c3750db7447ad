"""What is wrong with a file of HF PEFT for a model: all of it, so that one message lists everything."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD
from peftlight.errors import UserError, listed
from peftlight.interop.contents import Config, Tensors
from peftlight.interop.hf.targets import HEADS_OF_TASK, paths_of, selected, wrapped
from peftlight.paths import first_names

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a module's tensors by our names for them."""


@dataclass
class Found:
    """The tensors of a file by what they are."""

    matrices: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The method's own tensors of each site, by our names: A and B of a LoRA, say."""
    plain: Tensors = field(default_factory=dict)
    """Tensors of the base by their names there."""
    unknown: list[str] = field(default_factory=list)
    """What is wrong with the others."""


def heads_of(
    biases: Collection[str], entries: Sequence[str], implied: Sequence[str], found: Found, model: nn.Module
) -> list[str]:
    """Modules trained whole: what `modules_to_save` lists, and a head implied by the task where the file changes it.

    Raises:
        UserError: an entry is nowhere in the model.
    """
    paths, base = paths_of(model, tied_twice=True), model.state_dict()
    usual = {head for heads in HEADS_OF_TASK.values() for head in heads}
    lost = [entry for entry in entries if not wrapped([entry], paths) and entry not in usual]
    if lost or (entries and not wrapped(entries, paths)):
        raise UserError(f"modules_to_save lists {listed(lost or entries)}, which this {type(model).__name__} has not.")
    heads = wrapped(entries, paths)
    for head in wrapped(implied, paths):
        own = [key for key in found.plain if key.startswith(f"{head}.") and key not in biases]
        if head not in heads and not all(_same(found.plain[key], base[key]) for key in own):
            heads.append(head)
    return heads


def missing_sites(config: Config, found: Found, model: nn.Module, needed: Mapping[str, str]) -> list[str]:
    """What the file lacks of the sites that it has, or that the config selects.

    `needed` is what each must have: our names for it, and the file's.
    """
    missing = [f"missing: {needed[m]} of {s}" for s, own in found.matrices.items() for m in needed if m not in own]
    targets = config.get("target_modules")
    if targets and targets != "all-linear":
        absent = set(selected(config, paths_of(model))) - set(found.matrices)
        all_of_it = " and ".join(needed.values())
        missing += [f"missing: {all_of_it} of {site}, which target_modules selects" for site in sorted(absent)]
    return missing


def misshapen(
    found: Found, model: nn.Module, names: Mapping[str, str], shapes: Callable[[str, nn.Module], Shapes | None]
) -> list[str]:
    """Sites that the method cannot change, and tensors of another shape than the model and the config say.

    `shapes` gives what a site must have, or None where it can have nothing; `names` are the file's for our own.
    """
    wrong = []
    for site, own in found.matrices.items():
        module = model.get_submodule(site)
        expected = shapes(site, module)
        if expected is None:
            wrong.append(f"{site} is of the class {type(module).__name__}, which this method cannot change")
            continue
        wrong += [f"unexpected: {names[part]} of {site}" for part in sorted(own.keys() - expected.keys())]
        wrong += [
            f"{names[part]} of {site} has shape {tuple(own[part].shape)}; the model and the config need {shape}"
            for part, shape in expected.items()
            if part in own and own[part].shape != shape
        ]
    return wrong


def plain_state(
    biases: Collection[str], heads: Sequence[str], found: Found, model: nn.Module
) -> tuple[Tensors, list[str]]:
    """The base's tensors that the adapter trains, by their names in the model; and what is wrong with them."""
    base, first = model.state_dict(), _first_names(model)
    inside = tuple(f"{head}." for head in heads)
    wanted = {key for key in base if key.startswith(inside) and CHILD not in key.split(".")}
    wanted |= set(biases)
    problems = [f"missing: {key}" for key in sorted(wanted - found.plain.keys())]
    state: Tensors = {}
    for key, value in found.plain.items():
        if value.shape != base[key].shape:
            problems.append(f"{key} has shape {tuple(value.shape)}; in the model {tuple(base[key].shape)}")
        elif key not in wanted and not _same(value, base[key]):
            problems.append(f"unexpected: {key} differs from the base, but the config does not say that it is trained")
        elif key in wanted and not _same(state.setdefault(first.get(key, key), value), value):
            problems.append(f"{key} and {first[key]} are one tensor in this model, but differ in the file")
    return state, problems + _half_ties(wanted, state, first, base)


def _half_ties(wanted: set[str], state: Tensors, first: Mapping[str, str], base: Tensors) -> list[str]:
    """Tensors that the file trains apart from others that they are tied to in this model."""
    changed = {key for key, value in state.items() if value.shape == base[key].shape and not _same(value, base[key])}
    trained = {first.get(key, key): key for key in wanted}
    return [
        f"{trained[own]} is trained and {key} is not, but they are one tensor in this model: give one of them a "
        "copy of its own before loading"
        for key, own in first.items()
        if own in changed and key not in wanted
    ]


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each parameter's and buffer's name, to the first name that it has in the model."""
    first = first_names(model)
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first[id(tensor)] for name, tensor in tensors}


def _same(value: Tensor, own: Tensor) -> bool:
    alike = value.shape == own.shape and value.is_complex() == own.is_complex()
    return alike and torch.equal(value.to(own.device, own.dtype), own)
