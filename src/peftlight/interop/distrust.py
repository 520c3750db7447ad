"""What keeps a file from making us wait or allocate without end: limits on its patterns and on what it has built."""

import importlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from peftlight.errors import UserError
from peftlight.interop.contents import Config, Tensors

_LETTERS = 50
"""Of a path, for a repeat without end to choose from."""
_MOST_WAYS = 3_000_000
"""Four repeats without end that follow each other stay below; five do not."""
_FAR_TOO_MANY = 10**12
_DEEPEST = 50
_BY_NUMBER = ("arange", "eye", "linspace", "randperm")
_FREE = 1 << 27
"""Values that may be made whatever the file holds: projections that are drawn from a seed, for example."""


def check_patterns(config: Config) -> None:
    """See that no text in the config is a regular expression that could take for ever.

    Any text may be one: names of modules are matched as patterns. Python's `re` tries one way after the other to lay a
    pattern over a path, and repeats within repeats have exponentially many. So the ways are counted in advance.

    Raises:
        UserError: a pattern has too many ways, or is nested too deeply.
    """
    left = _MOST_WAYS
    for where, text, is_end in _texts(config, "", False):
        left -= _ways_of(where, text, is_end)
        if left < 0:
            raise UserError(
                f"{where} holds {text[:200]!r}. As a regular expression it could take for ever on the model's paths: "
                "it has repeats within repeats, or too many of them. Write it simpler, or list the modules by name."
            )


class Room(TorchDispatchMode):
    """Within it, new tensors have at most eight times as many values as those of the file, and 2^27.

    A file can name any size. Before a tensor is made, its size is taken off what is left.
    """

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.left = _FREE + 8 * sum(tensor.numel() for tensor in tensors.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(isinstance(argument, Tensor) for argument in args) or "::new_" in func.name():
            size = _size(func.name(), args)
            self.left -= size
            if self.left < 0:
                raise UserError(
                    f"The config asks for a tensor of {size} values, far more than its file of tensors holds."
                )
        return func(*args, **(kwargs or {}))


def _size(operation: str, args: Iterable[Any]) -> int:
    """How many values an operation makes, where its arguments say so: a shape, or one number for a few of them."""
    shapes = [arg for arg in args if isinstance(arg, list | tuple) and all(isinstance(n, int) for n in arg)]
    numbers = [arg for arg in args if isinstance(arg, int)] if any(name in operation for name in _BY_NUMBER) else []
    return prod(shapes[0]) if shapes else max(numbers, default=0)


def _texts(value: Any, where: str, is_end: bool) -> Iterator[tuple[str, str, bool]]:
    """Each text with its place; keys and entries of lists are matched with ends of paths, others with whole ones."""
    if isinstance(value, str):
        yield where, value, is_end
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, where, True)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield where or key, key, True
            yield from _texts(item, f"{where}.{key}".lstrip("."), False)


def _ways_of(where: str, text: str, is_end: bool) -> int:
    if not re.search(r"[*+?{|(]", text):
        return 0
    if _depth(text) > _DEEPEST:
        raise UserError(f"{where} holds {text[:200]!r}, which nests groups deeper than {_DEEPEST}.")
    nodes = _parsed(where, f"(?:.*\\.)?(?:{text})" if is_end else text)
    if nodes is None and is_end and _parsed(where, text) is not None:
        raise UserError(f"{where} holds {text[:200]!r}, which sets flags for a whole pattern: leave them out.")
    return 0 if nodes is None else _ways(nodes, 0)[0]


def _depth(text: str) -> int:
    """How many brackets are open at once, at most."""
    steps = ({"(": 1, ")": -1}.get(letter, 0) for letter in re.sub(r"\\.", "", text))
    return max(accumulate(steps), default=0)


def _parsed(where: str, text: str) -> Any:
    """The parts of a regular expression; None if it is none: where one is expected, the reader says what is wrong."""
    parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return parser.parse(text)
    except OverflowError:
        raise UserError(f"{where} holds {text[:200]!r}, which counts too far for a pattern.") from None
    except re.error:
        return None


def _ways(nodes: Iterable[Any], wide: int) -> tuple[int, int]:
    """An upper bound on how many ways there are to lay the nodes, one after the other, over a path.

    The n-th long repeat counts for an n-th of its lengths: each begins where the one before ends.

    Args:
        nodes: a part of a parsed pattern.
        wide: how many long repeats stand before it.

    Returns: the ways, and how many long repeats there are now.
    """
    ways = 1
    for kind, content in nodes:
        more, wide = _ways_of_node(str(kind), content, wide)
        ways = min(ways * more, _FAR_TOO_MANY)
    return ways, wide


def _ways_of_node(kind: str, content: Any, wide: int) -> tuple[int, int]:
    if kind.endswith("REPEAT"):
        least, most, inner = content
        return _ways_of_repeat(least, most, inner, wide)
    if kind in ("BRANCH", "GROUPREF_EXISTS"):
        branches = [branch for branch in content[1:] if branch] if kind != "BRANCH" else content[1]
        ways, wides = zip(*(_ways(branch, wide) for branch in branches), strict=True)
        return (max(ways) if _apart(branches) else sum(ways)), max(wides)
    if kind == "SUBPATTERN":
        return _ways(content[3], wide)
    if kind == "ATOMIC_GROUP":
        return _ways(content, wide)
    if kind.startswith("ASSERT"):
        return _ways(content[1], wide)
    return 1, wide


def _ways_of_repeat(least: int, most: int, inner: Any, wide: int) -> tuple[int, int]:
    each, wide_inside = _ways(inner, 0)
    times = min(int(most), _LETTERS)
    choices = times - min(int(least), times) + 1
    if each > 1:
        return min(choices * each**times, _FAR_TOO_MANY), wide + wide_inside
    return (choices, wide) if choices <= 2 else (-(-choices // (wide + 1)), wide + 1)


def _apart(branches: Sequence[Any]) -> bool:
    """Whether the branches are plain texts none of which begins another, so that one at most fits."""
    texts = [tuple(content for _, content in branch) for branch in branches]
    plain = all(str(kind) == "LITERAL" for branch in branches for kind, _ in branch)
    ordered = sorted(texts) if plain else []
    return plain and not any(after[: len(one)] == one for one, after in pairwise(ordered))
