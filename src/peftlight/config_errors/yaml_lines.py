"""YAML files with the line of every key, and whether a file is one at all."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from peftlight.errors import UserError, nearest

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one that jsonargparse takes: it decides what is YAML
_DEEPEST = 50
"""Lists and keys within each other; a real configuration has ten. The parser in C crashes where there are many."""
_MOST_NODES = 100_000
"""With every alias written out; a real configuration has a hundredth of it."""
_OF_TEXT = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_PLAINER = {
    "did not find expected key": "its indentation does not fit the lines above",
    "expected <block end>": "its indentation does not fit the lines above",
    "mapping values are not allowed": "a ':' where none can be: put the text in quotes, or check the indentation",
    "but found another document": "a second document begins ('---'); a configuration is one document",
}


def load(name: str) -> yaml.MappingNode:
    """The file's keys and values, each of which knows its line.

    Raises:
        UserError: it cannot be read, is not YAML, is not made of keys, has a key twice, or is endless.
    """
    text = _text(name)
    try:
        _refuse_odd(name, text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(_syntax(name, text, error)) from error
    if node is None:
        raise UserError(f"{name} is empty. It should hold keys such as model, data and trainer.")
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single text"
        raise UserError(
            f"{name}:{line(node)}: the file is {kind}. It should hold keys such as model, data and trainer."
        )
    for key in (key for key, _ in node.value if key.tag not in _OF_TEXT):
        shown = key.value if isinstance(key, yaml.ScalarNode) else "a list"
        raise UserError(f"{name}:{line(key)}: YAML does not read {shown} as text; keys are model, data and trainer.")
    _refuse_endless(name, node, {})
    _refuse_twice(name, node, set())
    return node


def inline(text: str) -> yaml.Node | None:
    """A list or mapping written on the command line; None for all other text."""
    if text[:1] not in ("{", "["):
        return None
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError:
        return None
    return node


def line(node: yaml.Node) -> int:
    """The line on which the node begins, counted from 1."""
    return int(node.start_mark.line) + 1


def pairs(node: yaml.MappingNode) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """The keys that are plain text, each with its value."""
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):
            yield key, value


def _text(name: str) -> str:
    try:
        data = Path(name).read_bytes()
    except FileNotFoundError as error:
        folder, _, base = name.rpartition("/")
        around = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
        hint = (
            nearest(base, [one for one in around if one.endswith((".yaml", ".yml"))], 2)
            or f" The working folder is {os.getcwd()}."
        )
        raise UserError(f"There is no file {name}.{hint}") from error
    except IsADirectoryError as error:
        files = sorted(path.name for path in Path(name).glob("*.y*ml"))[:5]
        hint = f" It has {', '.join(files)}." if files else ""
        raise UserError(f"{name} is a folder, not a YAML file.{hint}") from error
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        where = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{where}: this is not UTF-8 text. Save the file as UTF-8.") from error


def _syntax(name: str, text: str, error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), str(getattr(error, "problem", None) or error)
    if mark is None:
        return f"{name}: this is not YAML: {problem.splitlines()[0]}."
    if _open_brackets(text[: mark.index]) > _DEEPEST:  # newer parsers in C have a limit of their own, and read ahead
        return _too_deep(f"{name}:{mark.line + 1}")
    lines = text.splitlines()
    shown = lines[mark.line] if mark.line < len(lines) else ""
    problem = next((plain for raw, plain in _PLAINER.items() if raw in problem), problem)
    before = shown[: mark.column + 1]
    if "\t" in before and not before.strip():
        problem = "a tab is in its indentation; YAML wants spaces"
    context, start = getattr(error, "context", None), getattr(error, "context_mark", None)
    opened = f"\n  {context} from line {start.line + 1}" if context and start and start.line != mark.line else ""
    return f"{name}:{mark.line + 1}: this line is not YAML: {problem}.{opened}\n  {shown.strip()[:100]}"


def _too_deep(where: str) -> str:
    return f"{where}: lists and keys stand more than {_DEEPEST} deep in each other."


def _open_brackets(text: str) -> int:
    return sum(map(text.count, "[{")) - sum(map(text.count, "]}"))


def _refuse_odd(name: str, text: str) -> None:
    """Depths at which the parser in C would crash, and tags that ask for objects of Python."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        where = f"{name}:{event.start_mark.line + 1}"
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise UserError(_too_deep(where))
        tag = str(getattr(event, "tag", None) or "")
        if tag.startswith("tag:yaml.org,2002:python"):
            raise UserError(f"{where}: the tag !!{tag.rpartition(':')[2]} asks for an object of Python, and is not "
                            "read. A class is named by class_path.")  # fmt: skip
        if tag.startswith("!"):
            raise UserError(f"{where}: the tag {tag} means nothing here. Write the value itself.")


def _refuse_endless(name: str, node: yaml.Node, counts: dict[int, int]) -> int:
    """How many nodes there are with all aliases written out; 0 in `counts` marks those that are being counted."""
    if counts.get(id(node)) == 0:
        raise UserError(f"{name}:{line(node)}: what the anchor on this line names holds an alias to itself.")
    if id(node) not in counts:
        counts[id(node)] = 0
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        items = [item for pair in inner for item in pair] if isinstance(node, yaml.MappingNode) else inner
        counts[id(node)] = 1 + sum(_refuse_endless(name, item, counts) for item in items)
    if counts[id(node)] > _MOST_NODES:
        raise UserError(f"{name}:{line(node)}: with its aliases written out, this has more than {_MOST_NODES} values.")
    return counts[id(node)]


def _refuse_twice(name: str, node: yaml.Node, seen: set[int]) -> None:
    """YAML itself takes the last of two equal keys and says nothing."""
    if id(node) in seen:
        return
    seen.add(id(node))
    first: dict[str, int] = {}
    for key, value in pairs(node) if isinstance(node, yaml.MappingNode) else ():
        if key.value in first and key.value != "<<":
            raise UserError(
                f"{name}:{line(key)}: '{key.value}' is given twice, first on line {first[key.value]}. Keep one of them."
            )
        first[key.value] = line(key)
        _refuse_twice(name, value, seen)
    for item in node.value if isinstance(node, yaml.SequenceNode) else ():
        _refuse_twice(name, item, seen)
