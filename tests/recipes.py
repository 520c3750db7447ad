"""The strategies of `configs/`, so that a new YAML is tested without being listed anywhere else."""

from functools import partial
from pathlib import Path
from typing import Any

import yaml

import peftlight.strategies
from peftlight import PEFTStrategy

CONFIGS = Path(__file__).parents[1] / "configs"
TOKENS = list(range(2, 100))
"""For trainable tokens: all that the tiny models' batches hold."""


def made(spec: Any) -> PEFTStrategy:
    """The strategy that a YAML describes, by a short name or by class_path and init_args."""
    if isinstance(spec, str):
        spec = {"class_path": spec}
    arguments = {name: _value(value) for name, value in (spec.get("init_args") or {}).items()}
    if "token_indices" in arguments:
        arguments["token_indices"] = TOKENS
    if "rank" in arguments:
        arguments["rank"] = min(arguments["rank"], 8)
    strategy: PEFTStrategy = getattr(peftlight.strategies, spec["class_path"])(**arguments)
    return strategy


def _value(value: Any) -> Any:
    """A list of strategies (a stack's) is made too."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [made(item) for item in value]
    return value


def _strategy_of(path: Path) -> Any:
    return yaml.safe_load(path.read_text())["model"]["init_args"]["strategy"]


RECIPES = {path.stem: partial(made, _strategy_of(path)) for path in sorted(CONFIGS.glob("*.yaml")) if path.stem != "demo"}
"""A function that makes each strategy, by the name of its YAML; picklable."""
