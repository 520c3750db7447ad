"""From the words of a command line to a call of the command's function."""

import argparse
import importlib
import inspect
import re
from argparse import SUPPRESS
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from peftlight import own_modules
from peftlight.commands.pipes import reader_may_leave
from peftlight.errors import UserError, listed, nearest

Command = Callable[..., int | None]
_OF_FIT = ("model", "data", "trainer", "optimizer", "lr_scheduler", "seed_everything", "config", "ckpt_path")
"""Options of `peftlight fit` that are one word."""


class FitOptions(list[str]):
    """Options of `peftlight fit`, as they were given; a command with a parameter of this kind takes them too."""


class _Help(DefaultHelpFormatter):
    """Says defaults; jsonargparse would add types as Python writes them."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        return text if action.required or action.default in (None, SUPPRESS) else f"{text} (default: %(default)s)"


def call(command: str, arguments: Sequence[str]) -> int:
    """Run `commands/<command>.py` with the arguments that follow the command.

    Returns:
        The exit code: what the command returns, or 0.

    Raises:
        UserError: an argument is unknown, missing or of the wrong kind; or what the command raises.
    """
    function = getattr(importlib.import_module(f"peftlight.commands.{command}"), command)
    imports, own_words = own_modules.take_out(arguments)
    parser, passed = _parser(command, function), _passed(function)
    if passed:
        own_words, others = _parted(own_words, function)
    try:
        given = vars(parser.parse_args(own_words))
    except argparse.ArgumentError as error:
        raise UserError(_explained(command, function, str(error))) from error
    if passed:
        _check_passed(command, function, others)
    shared = _shared(function)
    own: dict[str, Any] = {name: given[name] for name in _hints(function) if name not in {*shared, *passed}}
    own |= {name: FitOptions(others) for name in passed}
    own_modules.import_each(imports)
    with reader_may_leave():
        return function(**own, **{name: kind(**_fields(kind, own, given)) for name, kind in shared.items()}) or 0


def _parser(command: str, function: Command) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(prog=f"peftlight {command}", exit_on_error=False, allow_abbrev=False,
                            formatter_class=_Help,
                            description=(inspect.getdoc(function) or "").partition("\n")[0])  # fmt: skip
    shared, passed = _shared(function), _passed(function)
    several = [name for name, parameter in inspect.signature(function).parameters.items() if _is_several(parameter)]
    for name in several:
        parser.add_argument(name, nargs="+", type=str, help=_help_of(function, name))
    skip: set[str | int] = {*several, *shared, *passed}
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skip)
    for kind in shared.values():
        own = set(_hints(function)) & set(_hints(kind))
        parser.add_class_arguments(kind, as_group=False, skip=own)
    if passed:
        usage = parser.format_usage().removeprefix("usage: ").rstrip()
        parser.usage = f"{usage} --config FILE [--KEY VALUE ...]"
    parser.add_argument(own_modules.OPTION, metavar="FILE_OR_MODULE", help=own_modules.HELP)  # taken out before
    return parser


def _is_several(parameter: inspect.Parameter) -> bool:
    """Whether the parameter takes the words that stand alone, all but those of the parameters after it."""
    return parameter.annotation == list[str] and parameter.default is parameter.empty


def _shared(function: Command) -> dict[str, type]:
    """Parameters that are dataclasses: their fields are options too, but for those that the command has itself."""
    return {name: kind for name, kind in _hints(function).items() if isinstance(kind, type) and is_dataclass(kind)}


def _passed(function: Command) -> list[str]:
    """Parameters that take the options of `fit`."""
    return [name for name, kind in _hints(function).items() if kind is FitOptions]


def _parted(arguments: Sequence[str], function: Command) -> tuple[list[str], list[str]]:
    """The words of the command's own arguments, and those of the options that are not its own."""
    own = {f"--{name}" for name in _options(function).keys() - set(_passed(function))} | {"-h", "--help"}
    kept: list[str] = []
    others: list[str] = []
    to = kept
    for word in arguments:
        if re.match(r"--?[a-zA-Z]", word):
            to = kept if word.partition("=")[0] in own else others
        to.append(word)
    return kept, others


def _check_passed(command: str, function: Command, others: Sequence[str]) -> None:
    """See that what is not the command's own can be an option of `fit`, and that its files can be read."""
    from peftlight.config_errors.given import read_given

    known = [*(name for name in _options(function) if name not in _alone(function)), *_OF_FIT]
    for word in others:
        name = word.partition("=")[0].removeprefix("--").rstrip("+")
        if word.startswith("--") and "." not in name and name not in known:
            near = nearest(f"--{name}", [f"--{one}" for one in known])
            raise UserError(f"{command} has no argument '--{name}'.{near} See: peftlight {command} --help")
    if not others:
        raise UserError(f"{command} needs a configuration: peftlight {command} ... --config FILE, and options of fit "
                        f"over it. See: peftlight {command} --help")  # fmt: skip
    read_given(["fit", *others])


def _alone(function: Command) -> list[str]:
    """What has no default, and stands without its name."""
    parameters = inspect.signature(function).parameters.items()
    skip = {*_shared(function), *_passed(function)}
    return [name for name, one in parameters if one.default is one.empty and name not in skip]


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
    said, options, alone = " ".join(said.split()), _options(function), _alone(function)
    text, near = said.rstrip("."), ""
    if unknown := said.partition("unrecognized arguments: ")[2]:
        text, word = f"{command} has no argument {unknown!r}", unknown.split()[0].partition("=")[0]
        near = nearest(word, [f"--{name}" for name in options if name not in alone])
        if word.removeprefix("--") in alone:
            near = f" It stands without the name: peftlight {command} {' '.join(alone).upper()}"
        elif _passed(function) and not word.startswith("-"):
            near = f" Did you mean --config {word}?"
    elif wrong := re.match(r'Parser key "(\w+)": .*(?:Got|Given) value: (.*)', said):
        from peftlight.config_errors.type_words import choices, described

        kind = options[wrong[1]]
        name = wrong[1].upper() if wrong[1] in alone else f"--{wrong[1]}"
        text = f"{name} is {wrong[2]!r}; expected {described(kind)}"
        near = nearest(wrong[2], choices(kind))
    elif missing := said.partition("arguments are required: ")[2]:
        from peftlight.config_errors.type_words import choices

        words = choices(options.get(missing))
        of = f", one of {listed(words)}" if words else ""
        text = f"{command} needs {missing.upper()}{of}: peftlight {command} {' '.join(alone).upper()}"
    return f"{text}.{near} See: peftlight {command} --help"
