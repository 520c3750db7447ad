"""From the words of a command line to a call of the command's function."""

import argparse
import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser

from peftlight.errors import UserError, nearest


def call(command: str, arguments: Sequence[str]) -> None:
    """Run `commands/<command>.py` with the arguments that follow the command.

    Raises:
        UserError: an argument is unknown, missing or of the wrong kind; or what the command raises.
    """
    function = getattr(importlib.import_module(f"peftlight.commands.{command}"), command)
    parser = _parser(command, function)
    try:
        given = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise UserError(_explained(command, function, str(error))) from error
    function(**{name: getattr(given, name) for name in inspect.signature(function).parameters})


def _parser(command: str, function: Callable[..., None]) -> ArgumentParser:
    parser = ArgumentParser(prog=f"peftlight {command}", exit_on_error=False, allow_abbrev=False,
                            description=(inspect.getdoc(function) or "").partition("\n")[0])  # fmt: skip
    several = [name for name, parameter in inspect.signature(function).parameters.items() if _is_several(parameter)]
    for name in several:
        parser.add_argument(name, nargs="+", type=str, help=_help_of(function, name))
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(several))
    return parser


def _is_several(parameter: inspect.Parameter) -> bool:
    """Whether the parameter takes the words that stand alone, all but those of the parameters after it."""
    return parameter.annotation == list[str] and parameter.default is parameter.empty


def _help_of(function: Callable[..., Any], name: str) -> str:
    lines = (inspect.getdoc(function) or "").splitlines()
    found = next((line for line in lines if line.strip().startswith(f"{name}: ")), "")
    return found.partition(": ")[2]


def _explained(command: str, function: Callable[..., Any], said: str) -> str:
    """What to tell a person about what the parser said."""
    said, parameters = " ".join(said.split()), inspect.signature(function).parameters
    text, near = said.rstrip("."), ""
    if unknown := said.partition("unrecognized arguments: ")[2]:
        text = f"{command} has no argument {unknown!r}"
        near = nearest(unknown.split()[0].partition("=")[0], [f"--{name}" for name in parameters])
    elif wrong := re.match(r'Parser key "(\w+)": .*(?:Got|Given) value: (.*)', said):
        from peftlight.config_errors.type_words import choices, described

        kind = get_type_hints(function)[wrong[1]]
        text = f"--{wrong[1]} is {wrong[2]!r}; expected {described(kind)}"
        near = nearest(wrong[2], choices(kind))
    return f"{text}.{near} See: peftlight {command} --help"
