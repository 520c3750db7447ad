"""What pyproject.toml asks for, what constraints.txt pins, and what of both is installed."""

import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def plain() -> list[Requirement]:
    """What an install without extras asks for."""
    return list(map(Requirement, _project()["dependencies"]))


def extras() -> dict[str, list[Requirement]]:
    """What each extra asks for beside that."""
    return {name: list(map(Requirement, asked)) for name, asked in _project()["optional-dependencies"].items()}


def direct() -> list[Requirement]:
    """All that pyproject.toml asks for."""
    return [*plain(), *(one for each in extras().values() for one in each)]


def needed(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """The installed distributions that these bring, and those that they bring, by their canonical names."""
    found: dict[str, Distribution] = {}
    seen, waiting = set(), [(one, frozenset(one.extras)) for one in requirements]
    while waiting:
        one, chosen = waiting.pop()
        name = canonicalize_name(one.name)
        if (name, chosen) in seen:
            continue
        seen.add((name, chosen))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # of CUDA, where torch was built for the CPU
            continue
        for inner in map(Requirement, found[name].requires or ()):
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in ["", *chosen]):
                waiting.append((inner, frozenset(inner.extras)))
    return found


def pins() -> dict[str, list[Requirement]]:
    """The lines of constraints.txt by canonical name: several where versions of Python differ."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, list[Requirement]] = {}
    for one in map(Requirement, (line for line in lines if line and not line.startswith("#"))):
        found.setdefault(canonicalize_name(one.name), []).append(one)
    return found


def pinned(name: str) -> str | None:
    """The version that is pinned for this Python on this machine."""
    here = (one for one in pins().get(name, []) if one.marker is None or one.marker.evaluate())
    return next((next(iter(one.specifier)).version for one in here), None)


def as_pinned(names: Iterable[str]) -> bool:
    """Whether each of these packages has the version of constraints.txt."""
    return all(Version(version(name)).public == pinned(canonicalize_name(name)) for name in names)
