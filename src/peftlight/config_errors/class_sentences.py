"""What a person reads about classes: a function for each kind of problem. An empty text leaves it to the next kind."""

import sys
from dataclasses import replace
from types import ModuleType

from peftlight.config_errors.given import Path, class_given
from peftlight.config_errors.places import CLASS_KEYS, parameters
from peftlight.config_errors.problem import Problem, dotted, near
from peftlight.errors import listed, nearest

_OWN = "A class of your own is given by its path: my_module.MyClass"


def unknown_class(problem: Problem) -> str:
    """A short name that no class has."""
    name = problem.words[-1]
    path = tuple(problem.words[0].split(".")) if len(problem.words) > 1 else problem.path
    known = problem.places.known(path)
    if not known:
        return ""
    at = problem.at(path, name) if path == problem.path else f"--{dotted(path)}.help:"
    return f"{at} there is no class '{name}'.{near(name, known)}\n  Known: {listed(sorted(known), 24)}.\n  {_OWN}"


def no_such_class(problem: Problem) -> str:
    """A class path whose module or class does not exist."""
    name, lost = problem.words[:2]
    at = problem.at(problem.path, name)
    module, _, base = name.rpartition(".")
    if lost == base:
        there = [key for key, kind in vars(sys.modules.get(module, ModuleType(""))).items() if isinstance(kind, type)]
        return f"{at} the module {module} has no class '{base}'.{near(base, there)}\n  It has {listed(there)}."
    parts = module.split(".")
    if lost in parts:  # a package is there, and has no such module
        lost = ".".join(parts[: parts.index(lost) + 1])
    if not f"{module}.".startswith(f"{lost}."):
        return ""  # the module is there, and fails to import another
    meant = near(base, problem.places.known(problem.path))
    what_to_do = _where_to_put(lost, module)
    return f"{at} {name} is not found: there is no module '{lost}'.{meant}\n  {what_to_do}"


def _where_to_put(lost: str, module: str) -> str:
    package = lost.rpartition(".")[0]
    if package:
        return f"The package {package} is there: look at the rest of the name."
    file = f"FOLDER/{module.replace('.', '/')}.py"
    return f"Install its package, run the command in the folder that it is in, or name its file: --import {file}"


def wrong_kind(problem: Problem) -> str:
    """A class that exists and is none of those that are wanted."""
    name, wanted = problem.words
    known = problem.places.known(problem.path)
    at = problem.at(problem.path, name)
    meant = near(name.rpartition(".")[2], known)
    return f"{at} {name} is not a {wanted}.{meant}" + (f"\n  Known: {listed(sorted(known), 24)}." if known else "")


def value_of_wrong_kind(problem: Problem) -> str:
    """The same, told without the class's name, which is the value."""
    return "" if problem.value is None else wrong_kind(replace(problem, words=(problem.value, *problem.words)))


def ambiguous(problem: Problem) -> str:
    """A short name that several classes have."""
    name, paths = problem.words
    return f"{problem.at(problem.path, name)} several classes are called '{name}'.\n  Write one of {paths}."


def no_name(problem: Problem) -> str:
    """A number or the like where the name of a class should be."""
    given = class_given(problem.given, problem.path)
    if given is None:
        return ""
    known = listed(sorted(problem.places.known(problem.path)), 10)
    return f"{given.where}: '{given.value}' is not the name of a class.\n  Known: {known}."


def unnamed(problem: Problem, place: Path) -> str:
    """Keys where a class should be named first."""
    known, beside = problem.places.known(place), problem.places.beside(place)
    for one in beside:
        meant = nearest(one.path[-1], CLASS_KEYS, 1)
        if meant and one.path[-1] not in CLASS_KEYS:
            return f"{one.where}: '{one.path[-1]}' cannot stand here.{meant}"
    if class_given(problem.given, place):
        return f"{problem.at(place)} it must be one class_path with init_args. Is there a dash too many?"
    keys = {one.path[-1] for one in beside}
    fitting = sorted(known, key=lambda name: (-len(keys & set(parameters(known[name]))), len(name)))
    return (f"{problem.at(place)} it does not say which class this is.\n"
            f"  Add class_path: {fitting[0]}, and put its parameters under init_args.\n"
            f"  Known: {listed(sorted(known), 24)}.")  # fmt: skip
