"""A configuration once Lightning's finders have found their values: with these, and without the finders."""

from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from peftlight.tasks import PEFTModule


def with_found(config: str, trainer: Trainer, module: PEFTModule) -> str:
    """What a run is recorded with that began with a search: it is gone on with, and repeated, without one.

    Args:
        config: the resolved configuration as YAML.
        trainer: whose callbacks may be finders that are done.
        module: holds the learning rate that was found.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # Lightning sets it from outside
    finders = [each for each in callbacks if isinstance(each, LearningRateFinder | BatchSizeFinder)]
    if not finders:
        return config
    found = yaml.safe_load(config)
    if module.learning_rate is not None:
        _options(found, "optimizer")["lr"] = module.learning_rate
    for name in (each._batch_arg_name for each in finders if isinstance(each, BatchSizeFinder)):
        _options(found, "data")[name] = getattr(trainer.datamodule, name)  # type: ignore[attr-defined]
    names = {type(each).__name__ for each in finders}
    chosen = found["trainer"]["callbacks"]
    chosen = chosen if isinstance(chosen, list) else [chosen]
    found["trainer"]["callbacks"] = [one for one in chosen if one["class_path"].rpartition(".")[2] not in names] or None
    text: str = yaml.safe_dump(found, sort_keys=False)
    return text


def _options(config: dict[str, Any], key: str) -> dict[str, Any]:
    options: dict[str, Any] = config[key].setdefault("init_args", {})
    return options
