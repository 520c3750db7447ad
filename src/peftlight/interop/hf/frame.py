"""What HF PEFT's files of every method share: names of tensors, targets, heads, and values of the base.

A tensor's name there is `base_model.model.` and its path, with a name of the method's own after the module that it
changes; modules trained whole are full copies under their own paths, and the bias of an adapted layer is its
`base_layer.bias`.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from peftlight.delta import CHILD
from peftlight.errors import UserError, listed
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf import config_fields
from peftlight.interop.hf.checks import Found, heads_of, missing_sites, plain_state
from peftlight.interop.hf.names import PREFIX
from peftlight.interop.hf.targets import HEADS_OF_TASK, paths_of, targets_for, task_of, wrapped
from peftlight.linear import is_conv1d
from peftlight.paths import first_names, inside
from peftlight.strategy import Adapter, PEFTStrategy

_ODD_BIAS = re.compile(r".+\.(modules_to_save|original_module)\.(.+\.)?bias")
"""Keys that HF PEFT writes beside a head's own biases when bias is "all", and does not read."""


def written(adapter: Adapter, placed: Mapping[str, Tensors]) -> tuple[Config, Tensors]:
    """The fields that the configs of all methods have, and the file's tensors.

    Args:
        adapter: what is written; of its own tensors only those of the base.
        placed: what the method puts on each module, by the names it has there.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    model, heads, paths = adapter.model, heads_in(adapter), paths_of(adapter.model)
    task = task_of(model)
    if any(inside(site, wrapped(implied(task), paths)) for site in placed):
        task = None  # with a task HF PEFT would train the adapted head whole
    whole = wrapped([*heads, *implied(task)], paths_of(model, tied_twice=True))
    targets = targets_for(placed.keys(), paths, [*heads, *implied(task)])
    if crossed := [site for site in placed if inside(site, whole)]:
        raise UserError(
            f"HF PEFT trains all of {listed(whole)} whole, so {listed(crossed)} in it can have no adapter there."
        )
    config = {
        "peft_version": config_fields.PEFT_VERSION,
        "inference_mode": True,
        "task_type": task,
        "base_model_name_or_path": base_name(model),
        "target_modules": targets,
        "modules_to_save": heads or None,
    }
    tensors = {f"{PREFIX}{site}.{name}": value for site, own in placed.items() for name, value in own.items()}
    return config, tensors | _of_the_base(adapter, whole, placed.keys())


def found_in(config: Config, tensors: Tensors, model: nn.Module, parts: Mapping[str, str]) -> Found:
    """The file's tensors by what they are; `parts` are the method's names for its own tensors, and ours.

    Raises:
        UserError: the config's common fields hold values of the wrong kind, or no tensor is one of the method's.
    """
    config_fields.check_kinds(config)
    found, base, modules = Found(), model.state_dict(), set(paths_of(model, tied_twice=True))
    for key, value in tensors.items():
        path = key.removeprefix(PREFIX)
        plain = path.replace(".base_layer.", ".")
        end = next((part for part in parts if path.endswith(f".{part}")), None)
        site = path.removesuffix(f".{end}")
        if end and site in modules:
            found.matrices.setdefault(site, {})[parts[end]] = value
        elif plain in base:
            found.plain[plain] = value
        elif not _ODD_BIAS.fullmatch(path):
            found.unknown.append(f"unexpected: {key}, for which the model has no place")
    if not found.matrices:
        kind = config.get("peft_type")
        raise UserError(f"It holds no {kind} tensor that fits this {type(model).__name__}: {listed(tensors, 3)}.")
    return found


def targets_of(config: Config, found: Found, model: nn.Module) -> str | list[str]:
    """`target_modules` for a strategy of ours that changes exactly the modules that the file holds."""
    return targets_for(found.matrices, paths_of(model), config_fields.names(config, "modules_to_save"))


def contents(
    config: Config,
    strategy: PEFTStrategy,
    found: Found,
    model: nn.Module,
    name: str,
    needed: Mapping[str, str],
    problems: Sequence[str],
    biases: Collection[str] = (),
) -> Contents:
    """The adapter, once all of its file is known to fit the model; see `checked`.

    Raises:
        UserError: the file does not fit; the message lists everything.
    """
    heads, state = checked(config, found, model, needed, problems, biases)
    for site, own in found.matrices.items():
        state.update({key_of(site, name, part): value for part, value in own.items()})
    return Contents(strategy, heads, state)


def checked(
    config: Config,
    found: Found,
    model: nn.Module,
    needed: Mapping[str, str],
    problems: Sequence[str],
    biases: Collection[str] = (),
) -> tuple[list[str], Tensors]:
    """The modules that are trained whole, and the base's tensors that the file holds, by their names in the model.

    Args:
        config: the file's.
        found: the file's tensors.
        model: the base.
        needed: what each changed module must have: our names for it, and the method's.
        problems: what is wrong with the method's own tensors.
        biases: parameters of the base that the strategy trains.

    Raises:
        UserError: the file does not fit; the message lists everything.
    """
    entries, by_task = config_fields.names(config, "modules_to_save"), implied(config.get("task_type"))
    heads = heads_of(biases, entries, by_task, found, model)
    whole = {**config, "modules_to_save": [*entries, *by_task]}
    state, more = plain_state(biases, heads, found, model)
    wrong = [*missing_sites(whole, found, model, needed), *problems, *found.unknown, *more]
    if wrong:
        raise UserError(f"It does not fit this {type(model).__name__}:\n  " + "\n  ".join(wrong))
    return heads, state


def key_of(site: str, adapter: str, part: str) -> str:
    """The name in the model of a tensor that an adapter put on the module `site`."""
    return f"{site}.{CHILD}.{adapter}.{part}"


def heads_in(adapter: Adapter) -> list[str]:
    """The modules trained whole, and those tied to them: HF PEFT would leave the other end of the tie as it was."""
    modules = dict(adapter.model.named_modules(remove_duplicate=False))
    heads = [name for name in adapter.trained if name in modules]
    trained = {id(parameter) for head in heads for parameter in modules[head].parameters()}
    for path in paths_of(adapter.model, tied_twice=True):
        tied = any(id(parameter) in trained for parameter in modules[path].parameters(recurse=False))
        if tied and not inside(path, heads):
            heads.append(path)
    return sorted(heads)


def heads_of_config(config: Config, model: nn.Module) -> list[str]:
    """The modules that HF PEFT trains whole when it reads this config.

    Raises:
        UserError: the config's common fields hold values of the wrong kind.
    """
    config_fields.check_kinds(config)
    entries = [*config_fields.names(config, "modules_to_save"), *implied(config.get("task_type"))]
    return wrapped(entries, paths_of(model, tied_twice=True))


def copied_whole(adapter: Adapter) -> list[str]:
    """The modules of which HF PEFT wants a copy in the file: the heads, trained or not."""
    named = [*heads_in(adapter), *implied(task_of(adapter.model))]
    return wrapped(named, paths_of(adapter.model, tied_twice=True))


def transposed(adapter: Adapter) -> bool:
    """What HF PEFT calls `fan_in_fan_out`: whether the changed layers keep their weights as GPT-2 does."""
    return all(is_conv1d(adapter.model.get_submodule(site)) for site in adapter.sites)


def implied(task: str | None) -> tuple[str, ...]:
    """The heads that HF PEFT trains because of the task alone."""
    return HEADS_OF_TASK.get(task or "", ())


def base_name(model: nn.Module) -> str:
    """Where the base came from, as far as the model itself knows."""
    return getattr(getattr(model, "config", None), "name_or_path", None) or ""


def _of_the_base(adapter: Adapter, whole: Sequence[str], sites: Collection[str]) -> Tensors:
    """Copies of the modules in `whole`, and the single parameters that are trained in place."""
    tensors, trained, first = {}, adapter.state(), first_names(adapter.model)
    for path in whole:
        for key, value in adapter.model.get_submodule(path).state_dict(keep_vars=True).items():
            if _is_base(key):
                tensors[f"{PREFIX}{path}.{key}"] = trained.get(first.get(id(value), key), value.detach())
    for key, value in trained.items():
        module, _, leaf = key.rpartition(".")
        if _is_base(key) and not inside(module, whole):
            tensors[f"{PREFIX}{module}.base_layer.{leaf}" if module in sites else PREFIX + key] = value
    return tensors


def _is_base(key: str) -> bool:
    return CHILD not in key.split(".")
