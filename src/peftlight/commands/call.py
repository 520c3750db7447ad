"""From the words of a command line to a call of the command's function."""

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, set_parsing_settings

from peftlight.commands.pipes import reader_may_leave
from peftlight.errors import UserError, nearest

Command = Callable[..., None]


def call(command: str, arguments: Sequence[str]) -> None:
    """Run `commands/<command>.py` with the arguments that follow the command.

    Raises:
        UserError: an argument is unknown, missing or of the wrong kind; or what the command raises.
    """
    function = getattr(importlib.import_module(f"peftlight.commands.{command}"), command)
    parser = _parser(command, function)
    try:
        given = vars(parser.parse_args(list(arguments)))
    except argparse.ArgumentError as error:
        raise UserError(_explained(command, function, str(error))) from error
    shared = _shared(function)
    own = {name: given[name] for name in _hints(function) if name not in shared}
    with reader_may_leave():
        function(**own, **{name: kind(**_fields(kind, own, given)) for name, kind in shared.items()})


def _parser(command: str, function: Command) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"peftlight {command}", exit_on_error=False, allow_abbrev=False,
                            description=(inspect.getdoc(function) or "").partition("\n")[0])  # fmt: skip
    several = [name for name, parameter in inspect.signature(function).parameters.items() if _is_several(parameter)]
    for name in several:
        parser.add_argument(name, nargs="+", type=str, help=_help_of(function, name))
    shared = _shared(function)
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*several, *shared})
    for kind in shared.values():
        own = set(_hints(function)) & set(_hints(kind))
        parser.add_class_arguments(kind, as_group=False, skip=own)
    return parser


def _is_several(parameter: inspect.Parameter) -> bool:
    """Whether the parameter takes the words that stand alone, all but those of the parameters after it."""
    return parameter.annotation == list[str] and parameter.default is parameter.empty


def _shared(function: Command) -> dict[str, type]:
    """Parameters that are dataclasses: their fields are options too, but for those that the command has itself."""
    return {name: kind for name, kind in _hints(function).items() if isinstance(kind, type) and is_dataclass(kind)}


def _hints(owner: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(owner).items() if name != "return"}


def _fields(kind: type, own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in _hints(kind) if name not in own}


def _options(function: Command) -> dict[str, Any]:
    """The kinds of all that can be given, by name."""
    shared = _shared(function)
    own = {name: hint for name, hint in _hints(function).items() if name not in shared}
    return {name: hint for kind in shared.values() for name, hint in _hints(kind).items()} | own


def _help_of(function: Command, name: str) -> str:
    lines = (inspect.getdoc(function) or "").splitlines()
    found = next((line for line in lines if line.strip().startswith(f"{name}: ")), "")
    return found.partition(": ")[2]


def _explained(command: str, function: Command, said: str) -> str:
    """What to tell a person about what the parser said."""
    said, options = " ".join(said.split()), _options(function)
    text, near = said.rstrip("."), ""
    if unknown := said.partition("unrecognized arguments: ")[2]:
        text = f"{command} has no argument {unknown!r}"
        near = nearest(unknown.split()[0].partition("=")[0], [f"--{name}" for name in options])
    elif wrong := re.match(r'Parser key "(\w+)": .*(?:Got|Given) value: (.*)', said):
        from peftlight.config_errors.type_words import choices, described

        kind = options[wrong[1]]
        text = f"--{wrong[1]} is {wrong[2]!r}; expected {described(kind)}"
        near = nearest(wrong[2], choices(kind))
    return f"{text}.{near} See: peftlight {command} --help"
