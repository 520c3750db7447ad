"""The options of `fit` that say where a training begins; they are no part of its configuration."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peftlight.errors import UserError

_RESUME, _INIT, _ALLOW = "resume", "init_adapter", "allow_changes"
_OPTIONS = (_RESUME, _INIT, _ALLOW)


@dataclass(frozen=True)
class Asked:
    """What was asked for."""

    resume: str | None = None
    """The folder of a run or a checkpoint; empty: the newest run of the configuration; None: a new run."""
    init_adapter: str | None = None
    """Folder or hub id of the adapter whose weights a new run begins with."""
    allow_changes: tuple[str, ...] = ()
    """What may differ from the run that is continued."""


def take_out(arguments: Sequence[str]) -> tuple[Asked, list[str]]:
    """What `arguments`, a command and its options, ask for, and all other arguments.

    Raises:
        UserError: one of these options has no value, has several, or is given twice.
    """
    if arguments[:1] != ["fit"]:
        return Asked(), list(arguments)
    found: dict[str, list[str]] = {}
    rest: list[str] = []
    for option, words in _by_option(arguments):
        name = option.lstrip("-").replace("-", "_") if option.startswith("--") else ""
        if name not in _OPTIONS:
            rest += [option, *words]
        elif name in found and name != _ALLOW:
            raise UserError(f"{option} is given twice.")
        else:
            found.setdefault(name, []).extend(words)
    return _asked(found), rest


def _by_option(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words that follow it; OPTION=VALUE is parted only for those that are taken out."""
    option, words = arguments[0], []
    for argument in arguments[1:]:
        if not argument.startswith("--") and argument.partition("=")[0] != "-c":
            words.append(argument)
            continue
        yield option, words
        name, equals, value = argument.partition("=")
        own = name.lstrip("-").replace("-", "_") in _OPTIONS
        option, words = (name, [value]) if equals and own else (argument, [])
    yield option, words


def _asked(found: dict[str, list[str]]) -> Asked:
    for name in (_RESUME, _INIT):
        if len(found.get(name, ())) > 1:
            raise UserError(f"--{name} takes one value; it has {' '.join(found[name])}.")
    allowed = tuple(name for word in found.get(_ALLOW, ()) for name in word.strip("[]").replace(",", " ").split())
    for name, value, wanted in (
        (_INIT, "".join(found.get(_INIT, [])), "an adapter: its folder, or its name on the hub"),
        (_ALLOW, allowed, "the names of what may change, as the refusal says them"),
    ):
        if name in found and not value:
            raise UserError(f"--{name} needs {wanted}.")
    if found.get(_RESUME) == [""]:
        raise UserError("--resume is followed by an empty text: name the run, or leave the text out for the newest of "
                        "--config FILE.")  # fmt: skip
    if _RESUME in found and _INIT in found:
        raise UserError("--resume continues a run, --init_adapter begins a new one from an adapter: give one of them.")
    resume = "".join(found[_RESUME]) if _RESUME in found else None
    return Asked(resume, "".join(found.get(_INIT, [])) or None, allowed)
