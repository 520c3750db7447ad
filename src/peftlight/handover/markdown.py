"""Text of the user's in Markdown and YAML, so that none of it is taken for markup."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

_SPACE = re.compile(r"\s+")


def code(value: object) -> str:
    """The value as code within a line."""
    text = _SPACE.sub(" ", str(value)).strip()
    fence = "`" * (_longest(text) + 1)
    inner = f" {text} " if "`" in text else text
    return f"{fence}{inner}{fence}" if text else "(empty)"


def block(language: str, text: str) -> str:
    """The text as a block of code."""
    fence = "`" * max(3, _longest(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def bullets(items: Iterable[str]) -> str:
    """A list of lines that are Markdown already."""
    return "\n".join(f"- {item}" for item in items)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; the first column of each row is code."""
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for first, *rest in rows:
        cells = [code(first), *map(str, rest)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def as_yaml(values: Mapping[str, Any]) -> str:
    """The values as YAML, in their order."""
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000))


def _longest(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
