"""peftlight: parameter-efficient fine-tuning on PyTorch Lightning.

The public names are imported at their first use, so that `import peftlight` costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peftlight.adapters import Adapters
    from peftlight.handover.hub import adapter_folder
    from peftlight.interop import load_adapter, save_adapter
    from peftlight.strategy import Adapter, PEFTStrategy, attach

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "Adapters",
    "PEFTStrategy",
    "__version__",
    "adapter_folder",
    "attach",
    "load_adapter",
    "save_adapter",
]

_HOME = {
    "Adapter": "peftlight.strategy",
    "Adapters": "peftlight.adapters",
    "PEFTStrategy": "peftlight.strategy",
    "adapter_folder": "peftlight.handover.hub",
    "attach": "peftlight.strategy",
    "load_adapter": "peftlight.interop",
    "save_adapter": "peftlight.interop",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in {"callbacks", "data", "interop", "strategies", "tasks"}:
        return importlib.import_module(f"peftlight.{name}")
    raise AttributeError(f"module 'peftlight' has no attribute {name!r}")
