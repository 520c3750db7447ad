"""What a person reads about keys and values: a function for each kind of problem."""

import difflib
import sys
import typing
from collections.abc import Sequence

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import StrategyRegistry

from peftlight.config_errors.class_sentences import unnamed
from peftlight.config_errors.given import Given, Path, class_given, find, plain
from peftlight.config_errors.places import CLASS_KEYS, Places, bases, parameters
from peftlight.config_errors.problem import Problem, dotted, near
from peftlight.config_errors.type_words import choices, described, is_union, item
from peftlight.errors import listed
from peftlight.tasks.distribution import refused_kind

_OF_FIT = ("resume", "init_adapter", "allow_changes")
"""Options of the command line alone."""
_BOOLS = ("True", "False")

# ---- keys


def unknown_key(problem: Problem) -> str:
    """A key, or an option under a class, that nothing takes."""
    path = (*problem.path, *plain(tuple(problem.words[0].split("."))))
    start = len(problem.path)
    level = next((n for n in range(start, len(path)) if path[n] not in problem.options(path[:n])), len(path) - 1)
    place, key = path[:level], path[level]
    if key in CLASS_KEYS:
        beside = [one for one in problem.places.beside(place) if one.path[-1] not in CLASS_KEYS]
        return _beside_class(problem, beside[0]) if beside else ""
    found = find(problem.given, path[: level + 1])
    nameless = class_given(problem.given, place) is None
    if not nameless and key in problem.places.parameters(place):
        return ""  # the chosen class takes it: another way to read the value complains
    if nameless and problem.owner(place) in bases(problem.places.annotation(place)):
        return unnamed(problem, place)
    if found and not found.on_command_line and problem.places.known(place) and found.level[-2:-1] != ("init_args",):
        return _beside_class(problem, found)
    return _not_taken(problem, f"{found.where}:" if found else "", place, key, bool(found and found.on_command_line))


def _beside_class(problem: Problem, found: Given) -> str:
    """A key on the level of class_path that belongs one lower, or is misspelt."""
    key, place = found.path[-1], found.path[:-1]
    inside = key in problem.places.parameters(place)
    meant = " Put it under init_args." if inside else near(key, CLASS_KEYS)
    if not meant:
        return _not_taken(problem, f"{found.where}:", place, key, False)
    return f"{found.where}: '{key}' cannot stand beside class_path.{meant}"


def no_class(problem: Problem) -> str:
    """A value from which no class can be read."""
    if not problem.places.known(problem.path):
        return ""
    stray = [one for one in problem.places.beside(problem.path) if one.path[-1] not in CLASS_KEYS]
    if stray and class_given(problem.given, problem.path):
        return _beside_class(problem, stray[0])
    return unnamed(problem, problem.path)


def spaced_key(problem: Problem) -> str:
    """A key with a space in it."""
    key = problem.words[0]
    found = next((one for one in problem.given if key in one.level), None)
    return f"{found.where}: the key '{key}' has a space in it." if found else ""


def unknown_flag(problem: Problem) -> str:
    """An option of the command line that the parser does not know, or a word that belongs to none."""
    first = problem.words[0].split()[0]
    if not first.startswith("-"):
        return (f"'{first}' belongs to no option: options are written --KEY VALUE.\n"
                "  A value with spaces needs quotes; a list is one value: --KEY '[a, b]'")  # fmt: skip
    flag = first.partition("=")[0]
    path = plain(tuple(flag.lstrip("-").rstrip("+").split(".")))
    level = next((n for n in range(len(path)) if path[n] not in problem.places.parameters(path[:n])), len(path) - 1)
    return _not_taken(problem, f"{flag}:", path[:level], path[level], True)


def missing(problem: Problem) -> str:
    """Parameters without a default that were not given."""
    command = problem.places.command
    names = [name.strip().removeprefix(f"{command}.") for name in problem.words[0].split(",")]
    if not problem.path:
        names.sort(reverse=True)
        known = [f"  --{name}: {listed(sorted(problem.places.known((name,))))}" for name in names]
        needs = f"peftlight {command} needs {' and '.join(names)}: a file that has them, --config FILE, or options:"
        return "\n".join([needs, *known])
    paths = [(*problem.path, name) for name in names]
    empty = find(problem.given, paths[0])
    chosen = empty or class_given(problem.given, problem.path)
    owner = problem.owner(problem.path)
    where = f"{chosen.where}: " if chosen else ""
    needs = f"{where}{owner.__name__ if owner else dotted(problem.path)} needs {' and '.join(map(dotted, paths))}"
    wanted = [f"\n  --{dotted(path)}: {_wanted(problem, path)}" for path in paths]
    return f"{needs}{', which is empty' if empty else ''}.{''.join(wanted)}"


def empty(given: Sequence[Given], places: Places) -> str:
    """A key without a value, which jsonargparse lets pass and the class does not expect."""
    for one in given:
        words = described(places.annotation(one.path)) if one.value in ("", "null", "~") else ""
        if words and "null" not in words and one.path[-1] != "class_path":
            return f"{one.where}: {dotted(one.path)} must be {words}, and is empty."
    return ""


def no_value(problem: Problem) -> str:
    """An option at the end of the command line, or before another."""
    flag = problem.words[0].rpartition("/")[2]
    lone = [one.where for one in problem.given if one.where.startswith(f"{flag}.") and one.value is None]
    return f"{lone[-1] if lone else flag}: a value is missing after it."


def _not_taken(problem: Problem, where: str, place: Path, key: str, flag: bool) -> str:
    options, owner = problem.options(place), problem.owner(place)
    has_not = f"{owner.__name__} has no '{key}'." if owner else f"there is no key '{dotted((*place, key))}'."
    every = [*options, *_options_of_fit(problem, place, flag)]
    takes = f"\n  {'It takes' if place else 'There are'} {listed(every, 10 if place else len(every))}."
    return f"{where} {has_not}{_hint(problem, place, key, flag)}{takes}{problem.help(place)}".strip()


def _hint(problem: Problem, place: Path, key: str, flag: bool) -> str:
    if not place and key == problem.places.command:
        return f" A file serves every command: leave out the level '{key}'."
    if not place and key in _OF_FIT and not (flag and problem.places.command == "fit"):
        return f" It is an option of the command line: peftlight fit --{key} ..."
    here = near(key, [*problem.options(place), *_options_of_fit(problem, place, flag)])
    elsewhere = problem.places.holding(key)
    if not elsewhere and not here:
        close = difflib.get_close_matches(key, problem.places.all_keys(), 1, 0.75)
        elsewhere = problem.places.holding(close[0]) if close else []
    if not elsewhere:
        return here
    if flag:
        return f" Did you mean {' or '.join(f'--{dotted(path)}' for path in elsewhere[:2])}?"
    under = " or ".join(_levels(path[:-1]) for path in elsewhere[:2])
    named = elsewhere[0][-1]
    return f" It belongs {under}." if named == key else f" Did you mean '{named}' {under}?"


def _options_of_fit(problem: Problem, place: Path, flag: bool) -> Sequence[str]:
    return _OF_FIT if flag and not place and problem.places.command == "fit" else ()


def _levels(path: Path) -> str:
    names = [f"{name}: init_args:" if name != "trainer" else f"{name}:" for name in path]
    return f"under '{' '.join(names)}'" if names else "at the top level"


def _wanted(problem: Problem, path: Path) -> str:
    known, words = problem.places.known(path), described(problem.places.annotation(path))
    return f"{listed(sorted(known))}, or the path of your own class" if known and "a class path" in words else words


# ---- values


def wrong_type(problem: Problem) -> str:
    """A value of another type than the key takes."""
    path = problem.path
    annotation = problem.options(path[:-1]).get(path[-1]) if path else None
    if annotation is None and problem.kind:
        module, _, name = problem.kind.rpartition(".")
        owner = getattr(sys.modules.get(module), name, None)
        annotation = parameters(owner).get(path[-1]) if owner else None
    if annotation is None:
        return ""
    inner, branches = item(annotation), typing.get_args(annotation) if is_union(annotation) else ()
    if inner is not None and inner not in branches and str(inner) in problem.words[0]:
        annotation = inner
    found = find(problem.given, path, problem.value)
    value = found.value if found and found.value is not None else problem.value
    shown = f", not '{value[:80]}'" if value is not None else ""
    words, meant = described(annotation), near(str(value), choices(annotation))
    if value and words.startswith("text") and value[0] not in "[{":
        meant = f" In quotes it is text{', as words such as yes, no, on and off are' if value in _BOOLS else ''}."
    return f"{problem.at(path, problem.value)} must be {words}{shown}.{meant}{problem.help(path[:-1])}"


def unknown_to_trainer(problem: Problem) -> str:
    """A name of an accelerator or of a way to distribute that Lightning does not have."""
    option, name = problem.words
    registry = {"accelerator": AcceleratorRegistry, "strategy": StrategyRegistry}[option]
    known = sorted(["auto", *(one for one in registry if not refused_kind(one))], key=len)
    at = problem.at(("trainer", option), name)
    return f"{at} there is no {option} '{name}'.{near(name, known)}\n  Known: {listed(known, 8)}."


def no_device(problem: Problem) -> str:
    """An accelerator of which the machine has none."""
    there = [name for name, known in AcceleratorRegistry.items() if known["accelerator"].is_available()]
    at = problem.at(("trainer", "accelerator"))
    return f"{at} this machine has no device of the kind {problem.words[0]}. There is {listed(there)}."
