"""Paths of classes, as files name them: how a class is called, and which imported class a path means."""

import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from peftlight.errors import UserError, listed, nearest
from peftlight.own_modules import MODULE_NAME, OPTION, of_python

T = TypeVar("T")
NOTEBOOK = "a notebook"
"""Where a class is defined that no file holds."""
_MAIN = ("__main__", "__mp_main__")
"""The program that runs, as it is called there and in processes that it starts."""


class UnknownClass(UserError):
    """A file names a class that is not imported."""

    def __init__(self, message: str, class_path: str) -> None:
        super().__init__(message)
        self.class_path = class_path


def path_of(kind: type) -> str:
    """Module and name of a class; of one in a program that runs, as they are where its file is imported."""
    module, main = kind.__module__, sys.modules["__main__"]
    if module in _MAIN:
        spec, file = getattr(main, "__spec__", None), str(getattr(main, "__file__", None))
        module = spec.name if spec else Path(file).stem if file.endswith(".py") else "__main__"
    return f"{module}.{kind.__qualname__}"


def is_ours(kind: type) -> bool:
    """Whether peftlight brings the class."""
    return kind.__module__.partition(".")[0] == "peftlight"


def definition_of(kind: type) -> str:
    """What to import for the class: the name of its file, or that of the module within a package."""
    module = path_of(kind).removesuffix(f".{kind.__qualname__}")
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    if module in _MAIN or file is None:
        return NOTEBOOK if module in _MAIN else module
    return module if "." in module or "-packages" in file or of_python(file) else Path(file).name


def definitions(kinds: Iterable[type]) -> dict[str, str]:
    """For the paths of those classes that are not ours, what to import."""
    return {path_of(kind): definition_of(kind) for kind in kinds if not is_ours(kind)}


def found(class_path: str, parent: type[T]) -> type[T] | None:
    """The imported class of that path below `parent`; None where there is none.

    Nothing is imported. A class of a notebook, which has no module, is also found by its name in one that the user
    imported.
    """
    known = list(below(parent))
    exact = next((kind for kind in reversed(known) if path_of(kind) == class_path), None)
    if exact is not None or not class_path.startswith("__main__."):
        return exact
    name = class_path.removeprefix("__main__.")
    same = {path_of(kind): kind for kind in known if kind.__qualname__ == name and not is_ours(kind)}
    return next(iter(same.values())) if len(same) == 1 else None


def below(parent: type[T]) -> Iterator[type[T]]:
    """The imported subclasses of a class, and theirs."""
    for child in parent.__subclasses__():
        yield child
        yield from below(child)


def unknown(what: str, class_path: str, parent: type) -> UnknownClass:
    """The error for a class that a file names and that is not imported.

    Args:
        what: of which kind it is: strategy, task.
        class_path: its module and name.
        parent: the class below which it would be.
    """
    kinds: list[type] = list(below(parent))
    own = [path_of(kind) for kind in kinds if not is_ours(kind)]
    ours = sorted({kind.__name__ for kind in kinds if is_ours(kind)})
    module, _, name = class_path.rpartition(".")
    if module in sys.modules and module not in _MAIN:
        why = f"The module {module} is imported, and has no {what} {name}."
    elif module in _MAIN:
        why = ("It was defined in a notebook, which cannot be imported: put the class into a file, under the same "
               "name, and import that first.")  # fmt: skip
    else:
        why = "If it is yours, import its module first."
    return UnknownClass(f"The {what} {class_path} is not known.{nearest(class_path, [*own, *ours])} {why} "
                        f"Known: {listed([*own, *ours], 24)}.", class_path)  # fmt: skip


def to_type(error: BaseException, given: Sequence[str]) -> str | None:
    """The command with which a class is known that `error` tells of; None where it tells of none.

    Args:
        error: what ended a command.
        given: the command and its arguments.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UnknownClass):
        cause = cause.__cause__ or cause.__context__
    module = cause.class_path.rpartition(".")[0] if isinstance(cause, UnknownClass) else ""
    if not MODULE_NAME.fullmatch(module) or (module in sys.modules and module not in _MAIN):
        return None
    here = Path(*module.split(".")).with_suffix(".py").is_file()
    file = "FILE.py" if module in _MAIN else module if "." in module else f"{'' if here else 'FOLDER/'}{module}.py"
    line = f"peftlight {shlex.join([*given, OPTION, file])}"
    return f"On the command line, if you trust its code, which then runs:\n  {line}"
