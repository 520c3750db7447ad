"""What HF PEFT's files of prompt learning share: one table of numbers, and heads under names of their own.

The table is `prompt_embeddings`, as whatever network made it had left it. A tensor of a head is `base_model.` and its
path in the model, one `model.` less than with the other methods.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from peftlight.delta import CHILD
from peftlight.errors import UserError, nearest
from peftlight.interop import own_format
from peftlight.interop.contents import Config, Tensors
from peftlight.interop.hf import config_fields, frame, renames
from peftlight.interop.hf.checks import Found, heads_of, plain_state
from peftlight.interop.hf.names import PREFIX, SHORT_PREFIX
from peftlight.interop.hf.targets import paths_of, task_of, wrapped
from peftlight.strategies.prefix import PrefixTuning
from peftlight.strategies.prompt import PromptTuning
from peftlight.strategy import Adapter
from peftlight.typed import fits, kind_of

Hints = Mapping[str, Any]
"""The fields that a config may have, with the kind of their values; any may be null too."""

S = TypeVar("S", PrefixTuning, PromptTuning)

_TABLE = "prompt_embeddings"
_HINTS: Hints = {
    "peft_type": str, "task_type": str, "num_virtual_tokens": int, "token_dim": int, "num_layers": int,
    "num_attention_heads": int, "num_transformer_submodules": int, "modules_to_save": list[str], "inference_mode": bool,
    "base_model_name_or_path": str, "revision": str, "auto_mapping": dict, "peft_version": str,
}  # fmt: skip


@dataclass
class Parts:
    """What the files hold, apart from what the table means."""

    count: int
    """Number of virtual tokens."""
    table: Tensor
    """(rows, columns) of floating-point numbers."""
    heads: list[str]
    """Modules of the base that are trained whole."""
    state: Tensors
    """Their tensors by their names in the model."""
    problems: list[str]
    """What does not fit the model, for one message that lists everything."""


def task_for(model: nn.Module) -> str | None:
    """The task for which HF PEFT puts something before this model's tokens; None where it has none that fits."""
    task = task_of(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return task if task == "SEQ_2_SEQ_LM" else None
    is_backbone = getattr(model, "base_model", None) is model
    return "FEATURE_EXTRACTION" if task is None and is_backbone else task


def submodules(task: str | None) -> int:
    """How many stacks HF PEFT reckons with: an encoder and a decoder are two."""
    return 2 if task == "SEQ_2_SEQ_LM" else 1


def written(adapter: Adapter, kind: str, table: Tensor, sizes: Config) -> tuple[Config, Tensors]:
    """The config and the tensors of an adapter of the type `kind`, with its table, its `sizes` and its heads."""
    config, heads = frame.written(adapter, {})
    task, base = task_for(adapter.model), getattr(adapter.model, "config", None)
    config |= {
        "peft_type": kind,
        "task_type": task,
        "num_transformer_submodules": submodules(task),
        "num_layers": getattr(base, "num_hidden_layers", None),
        "num_attention_heads": getattr(base, "num_attention_heads", None),
        **sizes,
    }
    del config["target_modules"]
    renamed = {SHORT_PREFIX + key.removeprefix(PREFIX): value for key, value in heads.items()}
    return config, {_TABLE: table, **renamed}


def read(config: Config, tensors: Tensors, model: nn.Module, hints: Hints, stacks: int = 1) -> Parts:
    """The parts of an adapter whose config may have the fields of `hints` beside those of all prompt learning.

    The table must have `stacks` rows for each virtual token.

    Raises:
        UserError: a field is not known, is of another kind, or is about another sort of model; there is no such table.
    """
    _check_fields(config, {**_HINTS, **hints})
    task, count, table = _check_task(config, model), config.get("num_virtual_tokens"), tensors.get(_TABLE)
    if count is None:
        raise UserError("num_virtual_tokens is missing; expected the number of virtual tokens.")
    if table is None or table.dim() != 2 or not table.is_floating_point():
        found = "none" if table is None else f"one of shape {tuple(table.shape)} and {table.dtype}"
        raise UserError(f"It needs a tensor {_TABLE!r} with two dimensions and floating-point numbers; it has {found}.")
    heads, state, problems = _heads(config, tensors, model, frame.implied(task))
    problems += differing(config, {"num_transformer_submodules": submodules(task)})
    if len(table) != count * stacks:
        rows = f"{_TABLE} has {len(table)} rows; {count} virtual tokens need {count * stacks} in this model"
        check([rows, *problems], model)
    return Parts(count, table, heads, state, problems)


def recorded_beside(strategy: S, spec: Mapping[str, Any]) -> S:
    """The strategy that our record beside the files names, where they themselves say `strategy`.

    Raises:
        UserError: the record is of another adapter.
    """
    recorded = own_format.strategy_in(spec)
    if not isinstance(recorded, type(strategy)) or recorded.num_virtual_tokens != strategy.num_virtual_tokens:
        raise UserError(f"The record is of {recorded}, but the files hold {strategy}.")
    return recorded


def differing(config: Config, sizes: Mapping[str, int]) -> list[str]:
    """Fields that are given, but not as the model has them."""
    return [
        f"{field} is {config[field]}; for this model it is {size}"
        for field, size in sizes.items()
        if config.get(field) not in (None, size)
    ]


def check(problems: Iterable[str], model: nn.Module) -> None:
    """
    Raises:
        UserError: there are problems; it lists each once.
    """
    if lines := list(dict.fromkeys(problems)):
        raise UserError(f"It does not fit this {type(model).__name__}:\n  " + "\n  ".join(lines))


def _check_fields(config: Config, hints: Hints) -> None:
    unknown = [f"{field}={value!r}" for field, value in sorted(config.items()) if field not in hints and value]
    if unknown:
        raise UserError(f"It uses what is not supported here: {', '.join(unknown)}. Nothing of it may be ignored.")
    for field, hint in hints.items():
        if config.get(field) is not None and not fits(config[field], hint):
            raise UserError(f"{field} is {config[field]!r}; expected {kind_of(hint)}.")


def _check_task(config: Config, model: nn.Module) -> str:
    """The task, which decides how HF PEFT computes."""
    expected, given, kind = task_for(model), config.get("task_type"), type(model).__name__
    if expected is None:
        raise UserError(f"HF PEFT has no prompt learning for a {kind}, so these files cannot be for it.")
    if given is None:
        raise UserError(
            f"task_type is missing, and HF PEFT would load the adapter without its prompt. Set it to {expected!r} in "
            f"the config if the adapter is for this {kind}."
        )
    if given != expected:
        raise UserError(f"task_type is {given!r}; for this {kind} it is {expected!r}.{nearest(given, [expected])}")
    return expected


def _heads(
    config: Config, tensors: Tensors, model: nn.Module, implied: Sequence[str]
) -> tuple[list[str], Tensors, list[str]]:
    """The modules trained whole, their tensors, and what is wrong with them; HF PEFT wants the implied in any case."""
    found, base = Found(), model.state_dict()
    others = {PREFIX + key.removeprefix(SHORT_PREFIX): value for key, value in tensors.items() if key != _TABLE}
    config, others = renames.translated(config, others, model)
    for key, value in others.items():
        path = key.removeprefix(PREFIX)
        if path in base and CHILD not in path.split("."):
            found.plain[path] = value
        else:
            found.unknown.append(f"unexpected: {SHORT_PREFIX}{path}, for which the model has no place")
    heads = heads_of((), config_fields.names(config, "modules_to_save"), implied, found, model)
    state, problems = plain_state((), heads, found, model)
    inside = tuple(f"{head}." for head in wrapped(implied, paths_of(model, tied_twice=True)))
    lost = [key for key in base if inside and key.startswith(inside) and key not in found.plain]
    return (
        heads,
        state,
        [*found.unknown, *(f"missing: {key}" for key in lost if CHILD not in key.split(".")), *problems],
    )
