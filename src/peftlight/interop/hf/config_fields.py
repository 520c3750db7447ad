"""HF PEFT's LoRA config: what it may say for us to read it, and what it says for an adapter of ours."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from peftlight.errors import UserError
from peftlight.interop.contents import Config
from peftlight.strategies.lora import FROM_WEIGHT, LoRA
from peftlight.targets import pattern_value

PEFT_VERSION = "0.21.2"
"""The version of HF PEFT whose format this is."""

_OF_ALL = {"peft_type", "task_type", "target_modules", "exclude_modules", "modules_to_save"}
_WITHOUT_EFFECT = {
    "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "fan_in_fan_out",
    "runtime_config",
}  # fmt: skip
_OF_LORA = {
    "r", "lora_alpha", "lora_dropout", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "bias", "use_rslora", "use_dora", "init_lora_weights", "megatron_core", "qalora_group_size",
}  # fmt: skip
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights alone, so that the file's tensors are all there is to them."""


def check_supported(config: Config) -> None:
    """See that nothing in the config changes the numbers in a way that is not known here.

    Raises:
        UserError: an option is set that is not supported; the message names it.
    """
    start = config.get("init_lora_weights")
    if start not in (*_PLAIN_STARTS, *FROM_WEIGHT):
        raise UserError(
            f"init_lora_weights is {start!r}, an initialisation that changes the base's own weights in a way that "
            "cannot be repeated here: convert the adapter to plain LoRA in HF PEFT first (save_pretrained with "
            "path_initial_model_for_weight_conversion)."
        )
    check_fields(config, _OF_LORA)


def check_fields(config: Config, understood: Collection[str]) -> None:
    """See that no field has a value beside those that every method has and those that are `understood`.

    Raises:
        UserError: one has; the message names all of them.
    """
    known = {*_OF_ALL, *_WITHOUT_EFFECT, *understood}
    others = [f"{field}={value!r}" for field, value in sorted(config.items()) if field not in known and value]
    if others:
        raise UserError(f"It uses what is not supported here: {', '.join(others)}. Nothing of it may be ignored.")


def recipe(config: Config, sites: Collection[str], targets: str | list[str]) -> LoRA:
    """The strategy that the config describes, for the sites that the file holds.

    Raises:
        UserError: a field has a value of the wrong kind.
    """
    start = config.get("init_lora_weights")
    strategy = LoRA(
        rank=number(config, "r", 8, int),
        alpha=number(config, "lora_alpha", 8),
        dropout=float(number(config, "lora_dropout", 0.0)),
        target_modules=targets,
        rank_pattern=_patterns(config, "rank_pattern", int, sites),
        alpha_pattern=_patterns(config, "alpha_pattern", (int, float), sites),
        bias=_bias(config),
        use_rslora=switch(config, "use_rslora"),
        use_dora=switch(config, "use_dora"),
        init_lora_weights=start if start in FROM_WEIGHT else "default",
    )
    strategy.refuses_wasted_rank = False
    return strategy


def written(strategy: LoRA, ranks: Mapping[str, int], alphas: Mapping[str, float]) -> Config:
    """The fields of the config that follow from the strategy and from the rank and alpha of each site."""
    return {
        "peft_type": "LORA",
        "init_lora_weights": True,
        "r": strategy.rank,
        "lora_alpha": _plain(strategy.alpha),
        "lora_dropout": strategy.dropout,
        "bias": strategy.bias,
        "rank_pattern": _pattern_for(strategy.rank_pattern, strategy.rank, ranks),
        "alpha_pattern": _pattern_for(strategy.alpha_pattern, strategy.alpha, alphas),
        "layers_to_transform": None,
        "use_dora": strategy.use_dora,
        "use_rslora": strategy.use_rslora,
    }


def names(config: Config, field: str) -> list[str]:
    """The names in a field that holds a list or nothing, each once, in their order.

    Raises:
        UserError: the field holds something else.
    """
    value = config.get(field) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise UserError(f"{field} is {value!r}; expected a list of names.")
    return list(dict.fromkeys(value))


def check_kinds(config: Config) -> None:
    """See that the fields that select modules have values of the right kind.

    Raises:
        UserError: one has not.
    """
    if not isinstance(config.get("task_type"), str | None):
        raise UserError(f"task_type is {config['task_type']!r}; expected text.")
    for field in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
        one = isinstance(config.get(field), str) and field != "modules_to_save"
        for pattern in [config[field]] if one else names(config, field):
            check_pattern(field, pattern)
    layers = config.get("layers_to_transform")
    if not isinstance(layers, int | None) and not (
        isinstance(layers, list) and all(isinstance(number, int) for number in layers)
    ):
        raise UserError(f"layers_to_transform is {layers!r}; expected a number or a list of numbers.")


def check_feed_forward(named: Any) -> None:
    """See that `feedforward_modules` is a list of names or a regular expression.

    Raises:
        UserError: it is not.
    """
    if isinstance(named, list) and all(isinstance(entry, str) for entry in named):
        return
    if not isinstance(named, str):
        raise UserError(
            f"feedforward_modules is {named!r}; expected a list of names, or a regular expression. It says whose input "
            "is scaled instead of the output."
        )
    check_pattern("feedforward_modules", named)


def number(config: Config, field: str, default: Any, kinds: type | tuple[type, ...] = (int, float)) -> Any:
    """The number in a field.

    Raises:
        UserError: the field holds something else.
    """
    value = config.get(field, default)
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise UserError(f"{field} is {value!r}; expected a {'whole ' if kinds is int else ''}number.")
    return value


def switch(config: Config, field: str, default: bool = False) -> bool:
    """Whether a field says true.

    Raises:
        UserError: the field holds something else than true or false.
    """
    value = config.get(field, default) or False
    if not isinstance(value, bool):
        raise UserError(f"{field} is {value!r}; expected true or false.")
    return value


def _bias(config: Config) -> Any:
    value = config.get("bias", "none")
    if value not in ("none", "all", "lora_only"):
        raise UserError(f"bias is {value!r}; expected none, all or lora_only.")
    return value


def check_pattern(field: str, pattern: str) -> None:
    """See that a pattern in the field is a regular expression.

    Raises:
        UserError: it is not.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{field} holds {pattern!r}, which is not a regular expression: {error}.") from None


def _patterns(config: Config, field: str, kinds: type | tuple[type, ...], sites: Collection[str]) -> dict[str, Any]:
    """The patterns that match one of the sites; HF PEFT lets others stand in its files."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict) or not all(isinstance(value, kinds) for value in patterns.values()):
        raise UserError(f"{field} is {patterns!r}; expected a number for each name.")
    for pattern in patterns:
        check_pattern(field, pattern)
    return {key: value for key, value in patterns.items() if any(pattern_value({key: True}, s, False) for s in sites)}


def _pattern_for(patterns: Mapping[str, float], default: float, values: Mapping[str, float]) -> dict[str, float]:
    """Patterns that give each site its value; the strategy's own, unless sorting them changes which one wins."""
    by_name = dict(sorted(patterns.items()))
    if all(pattern_value(by_name, site, default) == value for site, value in values.items()):
        return {pattern: _plain(value) for pattern, value in by_name.items()}
    return {f"^{re.escape(site)}": _plain(value) for site, value in sorted(values.items()) if value != default}


def _plain(number: float) -> float:
    return int(number) if float(number).is_integer() else number
