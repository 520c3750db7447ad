"""What an adapter's files say, in our terms."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peftlight.strategy import PEFTStrategy

Config = dict[str, Any]
"""What `adapter_config.json` holds."""
Tensors = dict[str, Tensor]
"""What `adapter_model.safetensors` holds."""


@dataclass(frozen=True)
class Contents:
    """An adapter that is not on a model yet."""

    strategy: PEFTStrategy
    modules_to_train: list[str]
    """Modules of the base that are trained whole beside the strategy; in our own format single parameters too."""
    state: Tensors
    """The adapter's tensors by their names in the model."""
