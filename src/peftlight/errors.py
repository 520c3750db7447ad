"""The one kind of error that peftlight shows to a person."""

import difflib
import re
from collections.abc import Iterable, Mapping

_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Characters that end a line, steer a terminal, or turn the direction of writing."""
_HALVES = re.compile(r"[\ud800-\udfff]")


class UserError(Exception):
    """Something the user can put right: what was wrong, where, what was expected, what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """The sentence " Did you mean ...?" with the names of `known` most like `word`; empty if none is near."""
    by_lower: dict[str, str] = {}
    for name in known:
        by_lower.setdefault(name.lower(), name)
    near = difflib.get_close_matches(word.lower(), list(by_lower), n=count, cutoff=0.55)
    if not near:
        return ""
    return f" Did you mean {' or '.join(repr(by_lower[name]) for name in near)}?"


def listed(items: Iterable[object], most: int = 8) -> str:
    """The items separated by commas, with the number left out once there are more than `most`."""
    shown = [str(item) for item in items]
    rest = len(shown) - most
    return ", ".join(shown[:most]) + (f" and {rest} more" if rest > 0 else "")


def is_one_line(text: str) -> bool:
    """Whether the text holds nothing that ends a line, steers a terminal, or turns the direction of writing."""
    return _UNSEEN.search(text) is None


def one_line(text: str) -> str:
    """The text with such characters as escapes, so that a reader sees all of it, and in one line."""
    return _UNSEEN.sub(lambda found: repr(found[0])[1:-1], text)


HALF = "half of a character, which no UTF-8 holds: write the character whole, or remove it"
"""What is wrong where `half_character` finds something."""


def half_character(value: object) -> str:
    """What in plain data is no character but one of the two by which UTF-16 writes one; empty if there is nothing.

    JSON and YAML let it stand alone, and Python makes such of bytes on the command line that are not UTF-8.
    """
    if isinstance(value, str):
        found = _HALVES.search(value)
        return found[0] if found else ""
    if isinstance(value, Mapping):
        value = [*value, *value.values()]
    return next((half for each in value if (half := half_character(each))), "") if isinstance(value, list) else ""
