"""The strategies of `configs/`, so that a new YAML is tested without being listed anywhere else."""

from functools import partial
from pathlib import Path
from typing import Any

import yaml

from peftlight import PEFTStrategy
from peftlight.strategy_spec import as_strategy

CONFIGS = Path(__file__).parents[1] / "configs"
TOKENS = list(range(2, 100))
"""For trainable tokens: all that the tiny models' batches hold."""
RANK = 8
"""The largest that fits the tiny models."""


def made(spec: Any) -> PEFTStrategy:
    """The strategy that a YAML describes, by its name alone or by class_path and init_args."""
    if isinstance(spec, str):
        spec = {"class_path": spec, "init_args": {}}
    arguments = dict(spec["init_args"])
    if "token_indices" in arguments:
        arguments["token_indices"] = TOKENS
    if "rank" in arguments:
        arguments["rank"] = min(arguments["rank"], RANK)
    if "reduction_factor" in arguments:  # a bottleneck of two units may be dead
        arguments["reduction_factor"] = 4
    return as_strategy({**spec, "init_args": arguments})


def _strategy_of(path: Path) -> Any:
    return yaml.safe_load(path.read_text())["model"]["init_args"]["strategy"]


RECIPES = {
    path.stem: partial(made, _strategy_of(path))
    for path in sorted(CONFIGS.glob("*.yaml"))
    if path.stem not in ("4bit", "demo", "qlora")
}
"""A function that makes each strategy, by the name of its YAML; picklable."""
