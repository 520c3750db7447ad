"""A problem that was recognised, and the questions that its sentences ask of it."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

from peftlight.config_errors.given import Given, Path, find
from peftlight.config_errors.places import Places, parameters
from peftlight.errors import nearest


@dataclass(frozen=True)
class Problem:
    """What was recognised, and what it takes to say where and what else."""

    words: tuple[str, ...]
    """The names in the recognised sentence."""
    path: Path
    """The key it is about."""
    kind: str | None
    """Path of the class that has this key."""
    value: str | None
    given: Sequence[Given]
    places: Places

    def at(self, path: Path, value: str | None = None) -> str:
        """FILE:LINE and the key, or the option on the command line."""
        found = find(self.given, path, value)
        if found is None:
            return f"{dotted(path)}:"
        return f"{found.where}:" if found.on_command_line else f"{found.where}: {dotted(found.path)}:"

    def owner(self, path: Path) -> type | None:
        """The class whose parameters stand under `path`, if it is known."""
        module, _, name = (self.kind or "").rpartition(".")
        kind = getattr(sys.modules.get(module), name, None) if path == self.path else None
        classes = [kind] if isinstance(kind, type) else self.places.classes(path)
        return classes[0] if len(classes) == 1 else None

    def options(self, path: Path) -> dict[str, Any]:
        """What can be given under `path`."""
        owner = self.owner(path)
        return parameters(owner) if owner and path else self.places.parameters(path)

    def help(self, path: Path) -> str:
        """How to see all parameters of the class at `path`."""
        owner = self.owner(path)
        if owner is None or not self.places.known(path):
            return ""
        if get_origin(self.places.annotation(path)) is list:  # help is had for the class around it, not for an entry
            path = path[:-1]
        return f"\n  All of it: peftlight {self.places.command} --{dotted(path)}.help {owner.__name__}"


def near(word: str, known: Iterable[str]) -> str:
    """As `nearest`, but a name that differs in case alone is the only one."""
    known = list(known)
    same = [name for name in known if name.lower() == word.lower()]
    return nearest(word, same or known, 2)


def dotted(path: Path) -> str:
    """The keys as on the command line."""
    return ".".join(path)
