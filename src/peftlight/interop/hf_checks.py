"""What is wrong with a LoRA file of HF PEFT for a model: all of it, so that one message lists everything."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD
from peftlight.errors import UserError, listed
from peftlight.interop.contents import Config, Tensors
from peftlight.interop.hf_targets import HEADS_OF_TASK, paths_of, selected, wrapped
from peftlight.linear import is_linear, widths
from peftlight.paths import first_names
from peftlight.strategies.lora import LoRA
from peftlight.targets import pattern_value

_KEYS = {"A": "lora_A", "B": "lora_B", "m": "lora_magnitude_vector"}


@dataclass
class Found:
    """The tensors of a file by what they are."""

    matrices: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """A and B of each site, and m where it is a DoRA."""
    plain: Tensors = field(default_factory=dict)
    """Tensors of the base by their names there."""
    unknown: list[str] = field(default_factory=list)
    """What is wrong with the others."""


def heads_of(
    strategy: LoRA, entries: Sequence[str], implied: Sequence[str], found: Found, model: nn.Module
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
    heads, biases = wrapped(entries, paths), _biases(strategy, found, model)
    for head in wrapped(implied, paths):
        own = [key for key in found.plain if key.startswith(f"{head}.") and key not in biases]
        if head not in heads and not all(_same(found.plain[key], base[key]) for key in own):
            heads.append(head)
    return heads


def missing_sites(config: Config, found: Found, model: nn.Module) -> list[str]:
    """What the file lacks of the sites that it has, or that the config selects."""
    matrices = ("A", "B", "m") if config.get("use_dora") else ("A", "B")
    missing = [f"missing: {_KEYS[m]} of {s}" for s, pair in found.matrices.items() for m in matrices if m not in pair]
    targets = config.get("target_modules")
    if targets and targets != "all-linear":
        absent = set(selected(config, paths_of(model))) - set(found.matrices)
        missing += [f"missing: lora_A and lora_B of {site}, which target_modules selects" for site in sorted(absent)]
    return missing


def misfits(strategy: LoRA, found: Found, model: nn.Module) -> list[str]:
    """Sites that cannot be adapted, and matrices of another shape than the model and the config say."""
    wrong = []
    for site, pair in found.matrices.items():
        module, rank = model.get_submodule(site), pattern_value(strategy.rank_pattern, site, strategy.rank)
        expected = _shapes(module, rank)
        if expected is None:
            wrong.append(f"{site} is a {type(module).__name__}, which LoRA cannot adapt")
            continue
        for matrix, value in pair.items():
            if value.shape != expected[matrix]:
                wrong.append(
                    f"{_KEYS[matrix]} of {site} has shape {tuple(value.shape)}; the model and rank {rank} of the "
                    f"config need {expected[matrix]}"
                )
    return wrong


def plain_state(strategy: LoRA, heads: Sequence[str], found: Found, model: nn.Module) -> tuple[Tensors, list[str]]:
    """The base's tensors that the adapter trains, by their names in the model; and what is wrong with them."""
    base, first = model.state_dict(), _first_names(model)
    inside = tuple(f"{head}." for head in heads)
    wanted = {key for key in base if key.startswith(inside) and CHILD not in key.split(".")}
    wanted |= set(_biases(strategy, found, model))
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


def _shapes(module: nn.Module, rank: int) -> Mapping[str, tuple[int, ...]] | None:
    if is_linear(module):
        inputs, outputs = widths(module)
        return {"A": (rank, inputs), "B": (outputs, rank), "m": (outputs,)}
    if isinstance(module, nn.Embedding):
        dim = module.embedding_dim
        return {"A": (rank, module.num_embeddings), "B": (dim, rank), "m": (dim,)}
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        ones = (1,) * len(module.kernel_size)
        return {
            "A": (rank, module.in_channels, *module.kernel_size),
            "B": (module.out_channels, rank // module.groups, *ones),
            "m": (1, module.out_channels, *ones),
        }
    return None


def _biases(strategy: LoRA, found: Found, model: nn.Module) -> list[str]:
    biases = [key for key, _ in model.named_parameters() if key.rpartition(".")[2] == "bias"]
    biases = [key for key in biases if CHILD not in key.split(".")]
    if strategy.bias == "lora_only":
        return [key for key in biases if key.rpartition(".")[0] in found.matrices]
    return biases if strategy.bias == "all" else []


def _same(value: Tensor, own: Tensor) -> bool:
    return value.shape == own.shape and torch.equal(value.to(own.device, own.dtype), own)
