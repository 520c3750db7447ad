"""HF PEFT's own rules for which modules a config means, so that a file says the same to it and to us."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from peftlight.delta import CHILD
from peftlight.errors import UserError, listed

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""HF PEFT's task by what the name of the model's class contains."""

HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What HF PEFT adds to `modules_to_save` by itself."""


def task_of(model: nn.Module) -> str | None:
    """The `task_type` that fits the model; None where there is none."""
    kind = type(model).__name__
    task = next((task for part, task in TASKS.items() if part in kind), None)
    if task in {"CAUSAL_LM", "SEQ_2_SEQ_LM"} and not hasattr(model, "prepare_inputs_for_generation"):
        return None
    # Models of images and text are "for conditional generation" too, but have no encoder to feed apart.
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return None if task == "SEQ_2_SEQ_LM" and not encodes else task


def paths_of(model: nn.Module, *, tied_twice: bool = False) -> list[str]:
    """The paths of the base's own modules, without those that adapters brought along."""
    paths = [path for path, _ in model.named_modules(remove_duplicate=not tied_twice)]
    return [path for path in paths if path and CHILD not in path.split(".")]


def wrapped(entries: Iterable[str], paths: Iterable[str]) -> list[str]:
    """What `modules_to_save` selects: paths that end with an entry, be it in the middle of a word."""
    ends = tuple(entries)
    return [path for path in paths if path.endswith(ends)]


def selected(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The paths that `target_modules` selects together with the fields that narrow it."""
    return [path for path in paths if not _left_out(config, path) and _targeted(config, path)]


def is_feed_forward(named: str | Collection[str], site: str) -> bool:
    """Whether `feedforward_modules` means the path: all of it, or its end, be it in the middle of a word."""
    return re.fullmatch(named, site) is not None if isinstance(named, str) else site.endswith(tuple(named))


def targets_for(sites: Collection[str], paths: Sequence[str], heads: Collection[str]) -> str | list[str]:
    """The shortest `target_modules` that selects exactly `sites`, where `heads` are the `modules_to_save`.

    Raises:
        UserError: there is none, because the name of a head leaves out one of the sites.
    """
    leaves = sorted({site.rpartition(".")[2] for site in sites})
    exact = "|".join(re.escape(site) for site in sorted(sites))
    for targets in (leaves, sorted(sites), f"(?:{exact})"):
        if set(selected({"target_modules": targets, "modules_to_save": heads}, paths)) == set(sites):
            return targets
    lost = [site for site in sites if _left_out({"modules_to_save": heads}, site)]
    raise UserError(
        f"HF PEFT's format cannot say that {listed(sorted(lost))} have an adapter while {listed(sorted(heads))} "
        "are trained whole: it leaves out every path that has such a name in it."
    )


def _left_out(config: Mapping[str, Any], path: str) -> bool:
    excluded = config.get("exclude_modules") or []
    if isinstance(excluded, str):
        if re.fullmatch(excluded, path):
            return True
    elif any(_ends_in(path, entry) for entry in excluded):
        return True
    return any(re.match(rf"(^|.*\.){entry}($|\..*)", path) for entry in config.get("modules_to_save") or [])


def _targeted(config: Mapping[str, Any], path: str) -> bool:
    targets = config["target_modules"]
    if isinstance(targets, str):
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    return any(_ends_in(path, entry) for entry in targets) and _in_layers(config, path)


def _in_layers(config: Mapping[str, Any], path: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    stacks = [rf"(?:^|.*?\.){pattern}" for pattern in _as_list(config.get("layers_pattern") or [])]
    found = [re.match(rf"{stack}\.(\d+)\.", path) for stack in stacks or [r".*?\.[^.]*"]]
    numbers = [int(match[1]) for match in found if match]
    return bool(numbers) and numbers[0] in _as_list(layers)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _ends_in(path: str, entry: str) -> bool:
    return path == entry or path.endswith(f".{entry}")
