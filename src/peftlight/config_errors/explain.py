"""From an exception while a configuration is parsed, or its classes are made, to what a person is told."""

import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path as File

from peftlight.config_errors import class_sentences, sentences
from peftlight.config_errors.given import Given, Path, find, mentioned, plain, read_given
from peftlight.config_errors.places import Places
from peftlight.config_errors.problem import Problem
from peftlight.errors import UserError

_LONGEST = 400
_KEY = r'Parser key "([^"]+)"'
_KIND = r"Problem with given class_path '([^']+)'"
_SENTENCES: dict[str, Callable[[Problem], str]] = {
    r"Option '(.+)' is not accepted|does not accept option '(.+)'": sentences.unknown_key,
    r"Unexpected config: (\w+):$": sentences.unknown_key,
    r"unrecognized arguments: (.*)": sentences.unknown_flag,
    r"the following arguments are required: (.*)": sentences.missing,
    rf"{_KIND}:\s+(?:No module named '([^']+)'|.* has no attribute '([^']+)')": class_sentences.no_such_class,
    r"Import path (\S+) does not correspond to a subclass of (\w+)": class_sentences.wrong_kind,
    r"Import path does not correspond to a subclass of (\w+)": class_sentences.value_of_wrong_kind,
    r"--(\S+)\.help: Expected a dot import path string: (\S+)": class_sentences.unknown_class,
    r"Expected a dot import path string: (\S*)": class_sentences.unknown_class,
    r"Multiple subclasses with name (\w+)\. Give the full class path.*?: (.*)\.": class_sentences.ambiguous,
    r"Expected an? (?!path |dot import |<class 'NoneType'>)(.*)": sentences.wrong_type,
    r"Not a valid subclass of (\w+)": sentences.no_class,
    r'Spaces not allowed in keys: "([^"]+)"': sentences.spaced_key,
    r"argument of type '(\w+)' is not": class_sentences.no_name,
    r"argument (\S+): expected one argument": sentences.no_value,
    r"`(\w+)Accelerator` can not run on your system": sentences.no_device,
    r"You selected an invalid (accelerator|strategy) name: `\w+='([^']*)'": sentences.unknown_to_trainer,
}
"""What jsonargparse and Lightning say, the most telling first: of a union, every branch complains."""


def explain(error: BaseException, arguments: Sequence[str]) -> str:
    """What to tell a person about `error`, to which `arguments`, a command and its options, have led."""
    chain = list(_chain(error))
    try:
        given = read_given(arguments)
        return _explained(chain, given, Places(arguments[0], given))
    except UserError as own:
        return str(own)
    except Exception:  # an error in here must not hide the user's
        return _innermost(chain, [])


def _explained(chain: Sequence[BaseException], given: Sequence[Given], places: Places) -> str:
    own = next((error for error in chain if isinstance(error, UserError)), None)
    if own is not None:
        return _placed(given, str(own))
    text, value = _message(chain)
    for pattern, sentence in _SENTENCES.items():
        match = re.search(pattern, text)
        if match is None:
            continue
        before = _around(text[: match.start()])
        kinds = re.findall(_KIND, before)
        words = tuple(word for word in match.groups() if word is not None)
        answer = sentence(Problem(words, _path(before), kinds[-1] if kinds else None, value, given, places))
        if answer:
            return answer
    return _failed_import(chain[-1], given) or sentences.empty(given, places) or _innermost(chain, given)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _message(chain: Sequence[BaseException]) -> tuple[str, str | None]:
    """The sentences up to the first value that jsonargparse shows, and that value."""
    text = str(chain[0])
    for error in chain:
        if str(error).startswith("Config file loop detected") and error.__context__:
            text = text.replace(str(error), str(error.__context__))  # its second try hides what the first one found
    value = re.search(r"(?:Got value|Given value): (.*)", text)
    return text.split("Given value type")[0], value.group(1) if value else None


def _around(before: str) -> str:
    """The text up to here without what other branches of a union, each a point of a list, complain of."""
    kept: list[str] = []
    point = sys.maxsize
    for line in reversed(before.split("\n")):
        indent = len(line) - len(line.lstrip())
        if indent >= point:
            continue
        kept.append(line)
        if line.lstrip().startswith("- "):
            point = indent
    return "\n".join(reversed(kept))


def _path(text: str) -> Path:
    path: Path = ()
    for key in re.findall(_KEY, text):
        names = plain(tuple(key.split(".")))
        path = names if names[: len(path)] == path else (*path, *names)  # a file's key is told twice
    return path


def _failed_import(error: BaseException, given: Sequence[Given]) -> str:
    """An error from a module that the user named, while it was imported."""
    raised_in = _raised_in(error)
    foreign = [one for one in given if one.value and one.names_class and _not_imported(one.value)]
    if not foreign or not (raised_in or isinstance(error, SyntaxError | ImportError)):
        return ""
    return (f"{foreign[0].where}: {foreign[0].value} is found, but its module cannot be imported:\n"
            f"  {type(error).__name__}: {_short(str(error))}{raised_in}")  # fmt: skip


def _not_imported(name: str) -> bool:
    module, dot, _ = name.rpartition(".")
    return bool(dot) and module not in sys.modules


def _innermost(chain: Sequence[BaseException], given: Sequence[Given]) -> str:
    """What the exception says that the others wrap."""
    inner = next((error for error in reversed(chain) if str(error).strip()), chain[0])
    raised_in = _raised_in(inner)
    kind = f"{type(inner).__name__}: " if raised_in else ""
    more = "\n  --traceback shows how it came to this." if raised_in else ""
    path = _path(_message(chain)[0])
    return _placed(given, f"{kind}{_short(str(inner))}{raised_in}", path) + more


def _placed(given: Sequence[Given], text: str, path: Path = ()) -> str:
    found = mentioned(given, text) or (find(given, path) if path else None)
    return f"{found.where}: {text}" if found else text


def _short(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:3])[:_LONGEST] or "an error without a message; --traceback shows where"


def _raised_in(error: BaseException) -> str:
    """File and line of the user's own code; empty for that of libraries."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or "-packages" in frames[-1].filename or frames[-1].filename.startswith((sys.base_prefix, "<")):
        return ""
    return f" ({File(frames[-1].filename).name}:{frames[-1].lineno})"
