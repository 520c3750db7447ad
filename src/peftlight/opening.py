"""How adapters are opened: the options that all commands share."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Opening:
    """On which base adapters are opened, and what is allowed in doing so.

    A command with a parameter of this kind has its fields as options. Nothing heavy is imported here, so that its help
    costs nothing.
    """

    base: str | None = None
    """the base instead of the one that the adapters name."""
    revision: str | None = None
    """of the base, likewise."""
    trust_remote_code: bool = False
    """whether Python code of the base's repository may run; no adapter decides this."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = None
    """number format of the base; by default the few bits in which the adapters were trained on it, else float32; with
    predict and evaluate that of the training."""
    other_base: bool = False
    """whether the base may be another one than the adapters were trained on."""
    convert_pickle: bool = False
    """whether a pickle of tensors is read where there are no safetensors; nothing in it is run."""
