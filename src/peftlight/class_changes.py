"""Where one class of a configuration gives way to another: each has its own defaults; what is taken over is said."""

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from peftlight.config_errors.given import Given, Path, find, plain
from peftlight.config_errors.places import Places, parameters
from peftlight.errors import one_line

_RATE: Path = ("optimizer", "lr")
_METHOD: Path = ("model", "strategy")
_FILES = (".yaml", ".yml", ".json")


@dataclass(frozen=True)
class Taken:
    """A value that a file gave for one class, at a place where another one stands in the end."""

    path: Path
    """Its key."""
    where: str
    """FILE:LINE."""
    was: type
    now: type
    value: Any
    default: Any = None
    """That of the class in the end."""
    fate: Literal["kept", "left out", "default"] = "kept"
    """Whether it holds for the later class too, does not fit it, or was no more than the earlier one's default."""

    def __str__(self) -> str:
        value = one_line(str("null" if self.value is None else self.value))
        left = "" if self.fate == "kept" else f", which does not take it: left at {one_line(str(self.default))}"
        return f"{'.'.join(self.path)} {value} ({self.where}, for {self.was.__name__}; now {self.now.__name__}{left})"


class ClassChanges:
    """The classes that a command's arguments choose, one after the other, at each place."""

    def __init__(self, command: str, given: Sequence[Given], defaults: Mapping[str, Mapping[str, Any]]) -> None:
        """
        Args:
            command: the command, whose keys they are.
            given: what the user gave, in the order in which it is read.
            defaults: for each place of the top that has one, `class_path` and `init_args` where none is chosen.
        """
        self.places, self.given, self.defaults = Places(command, given), given, defaults

    def by_default(self) -> list[str]:
        """Options to be read before all others, which choose the default classes.

        As defaults of the parser they would have every value of theirs, and hand them on to a class that is chosen
        later. A value that is set here for a default class holds for no other one.
        """
        options = []
        for place, default in self.defaults.items():
            options.append(f"--{place}={default['class_path']}")
            chosen = self._chosen((place,))
            if not chosen or _is_named(default["class_path"], chosen[-1].value or ""):
                options += [f"--{place}.{key}={value}" for key, value in default.get("init_args", {}).items()]
        return options

    def taken(self, config: Mapping[str, Any]) -> list[Taken]:
        """What the classes in `config`, the resolved configuration, were given for others that stood there before."""
        return [one for place, section in _classes(config) for one in self._taken(place, section, config)]

    def _taken(self, place: Path, section: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[Taken]:
        now = self._named(section["class_path"], place)
        before = [(one, was) for one in self._chosen(place) if (was := self._class(one, place)) not in (None, now)]
        if now is None or not before:
            return
        own, types = own_defaults(now), parameters(now)
        for key, value in (section.get("init_args") or {}).items():
            path = (*place, key)
            last = next((one for one in reversed(self.given) if one.path[: len(path)] == path), None)
            was = None if last is None or not _file(last) else self._meant(last, place)
            if last is None or was is None or was is now or (isinstance(value, Mapping) and "class_path" in value):
                continue
            default = own.get(key)
            if types.get(key) is None and isinstance(default, list) != isinstance(value, list):
                yield Taken(path, last.where, was, now, value, default, "left out")
            elif path != _RATE and value != default and self._was_default(last, place, was, value):
                yield Taken(path, last.where, was, now, value, default, "default")
            elif value != default:
                yield Taken(path, last.where, was, now, value)
            elif last.path == path and last.value is not None and not _says(last.value, value):
                yield Taken(path, last.where, was, now, last.value, default, "left out")
        rate = find(self.given, _RATE)
        for one, was in before if place == _METHOD and rate is not None else ():
            if _file(one) and was and _file(one) == _file(rate):  # type: ignore[arg-type]
                yield Taken(_RATE, rate.where, was, now, config["optimizer"]["init_args"].get("lr"))  # type: ignore[union-attr]

    def _meant(self, one: Given, place: Path) -> type | None:
        """The class for which a file gave a value: that which it names itself, or which stood there before."""
        chosen, at = self._chosen(place), self.given.index(one)
        own = [each for each in chosen if _file(each) == _file(one)]
        named = own or [each for each in chosen if self.given.index(each) < at]
        default = self.defaults.get(".".join(place), {}).get("class_path", "")
        return self._class(named[-1], place) if named else self._named(default, place)

    def _was_default(self, one: Given, place: Path, was: type, value: Any) -> bool:
        """Whether the file lists every key of the earlier class, as a resolved one does, and has its default here."""
        depth = len(place)
        same = [each.path for each in self.given if _file(each) == _file(one) and each.path[:depth] == place]
        keys = {path[depth] for path in same if len(path) > depth}
        defaults = own_defaults(was)
        return keys >= defaults.keys() and defaults.get(one.path[depth], one) == value

    def _chosen(self, place: Path) -> list[Given]:
        """All that name a class there, in their order."""
        return [one for one in self.given if one.names_class and not str(one.value).endswith(_FILES)
                and one.path in (place, (*place, "class_path"))]  # fmt: skip

    def _class(self, one: Given, place: Path) -> type | None:
        return self._named(one.value or "", place)

    def _named(self, name: str, place: Path) -> type | None:
        module, _, base = name.rpartition(".")
        if not module:
            return self.places.known(place).get(name)
        try:
            kind = getattr(importlib.import_module(module), base, None)
        except Exception:  # what is wrong with it is said where it is parsed
            return None
        return kind if isinstance(kind, type) else None


def own_defaults(kind: type) -> dict[str, Any]:
    """The options of a class with their defaults, as plain data; null for those without one."""
    parser, options = ArgumentParser(exit_on_error=False), parameters(kind)
    functions = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    skipped = {name for each in functions for name in inspect.signature(each).parameters} - set(options)
    parser.add_class_arguments(kind, "own", skip=skipped, fail_untyped=False)
    text = parser.dump(parser.get_defaults(), skip_unset=False, skip_validation=True)
    defaults: dict[str, Any] = yaml.safe_load(text).get("own") or {}
    return defaults


def _classes(section: Any, place: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Each class in a configuration with its place; not those in lists."""
    if isinstance(section, Mapping):
        if "class_path" in section:
            yield place, section
        for key, value in section.items():
            yield from _classes(value, (*place, *plain((key,))))


def _is_named(path: str, name: str) -> bool:
    """Whether a short name, or a path through which a package may be entered elsewhere, is that of the class."""
    module, _, base = name.rpartition(".")
    package, _, own = path.rpartition(".")
    return base == own and (not module or f"{module}.".startswith(f"{package}."))


def _file(one: Given) -> str:
    """The file that gave it; empty for the command line."""
    return "" if one.on_command_line else one.where.rpartition(":")[0]


def _says(text: str, value: Any) -> bool:
    """Whether a text of a file is this value."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return bool(yaml.safe_load(text) == value) or text == str(value)
