"""Python files and modules of the user's own: imported where the user names them, and never because a file does."""

import importlib
import importlib.util
import keyword
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from peftlight.errors import UserError, nearest

OPTION = "--import"
HELP = "a Python file, or the name of a module, with a class of your own; it runs. May be given several times"
MODULE_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


imported: list[str] = []
"""What the command that runs was told to import, for the commands that it starts."""


def take_out(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """What is to be imported, and all other arguments.

    Raises:
        UserError: the option has no value.
    """
    names: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option != OPTION:
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("-"):
            raise UserError(f"{OPTION} needs a Python file or the name of a module: {OPTION} my_method.py")
        names.append(value)
    return names, rest


def import_each(names: Sequence[str]) -> None:
    """Import files and modules by their names; a file's folder is put at the end of Python's path.

    A file becomes the module that it would be from its folder, so that its classes have the same paths as in a
    training there.

    Raises:
        UserError: there is no such file or module, another one has its name, or its code fails.
    """
    imported[:] = names
    importlib.invalidate_caches()  # it may have been written a moment ago
    for name in names:
        is_file = name.endswith((".py", ".ipynb")) or os.sep in name or "/" in name
        import_module(_module_of(name) if is_file else name, f"{OPTION} {name}")


def _module_of(name: str) -> str:
    """The name of the module that a file holds; within a package it has the package's before it."""
    path = Path(os.path.abspath(name))
    if not path.exists():
        beside = [one.name for one in path.parent.glob("*.py")]
        raise UserError(f"{OPTION} {name}: there is no such file.{nearest(path.name, beside)}")
    file = path / "__init__.py" if path.is_dir() else path
    if file.suffix != ".py" or not file.is_file():
        raise UserError(f"{OPTION} {name}: expected a Python file (.py), the folder of a package, or a module's name.")
    parts = [] if file.name == "__init__.py" else [file.stem]
    root = file.parent
    while (root / "__init__.py").is_file():
        parts, root = [root.name, *parts], root.parent
    module = ".".join(parts)
    if not MODULE_NAME.fullmatch(module) or any(keyword.iskeyword(part) for part in parts):
        raise UserError(f"{OPTION} {name}: {module!r} cannot be a module's name, which has letters, digits and _ "
                        "alone: rename the file.")  # fmt: skip
    if str(root) not in sys.path:
        sys.path.append(str(root))
    _refuse_another(name, parts[0], root / parts[0] / "__init__.py" if len(parts) > 1 or path.is_dir() else file)
    return module


def _refuse_another(name: str, module: str, file: Path) -> None:
    """See that the module of that name is the file, and not one that is imported or comes before it on the path."""
    if (loaded := sys.modules.get(module)) is not None:
        found: str | None = getattr(loaded, "__file__", None)
    else:
        spec = importlib.util.find_spec(module)
        found = spec.origin if spec else None
    if found is None or not os.path.exists(found) or not os.path.samefile(found, file):
        raise UserError(f"{OPTION} {name}: a module {module} is known already, from {found or 'Python itself'}. Two "
                        "cannot have the same name: rename the file, or go to its folder and leave out the "
                        "other.")  # fmt: skip


def import_module(module: str, said: str) -> None:
    """Import a module that the user named; `said` is how, as an error message begins.

    Raises:
        UserError: there is no such module, or its code fails.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _failed(said, error) from error
        files = [path.stem for path in Path().glob("*.py")]
        package = module.partition(".")[0]
        elsewhere = (f"Of a package elsewhere, go to the folder that {package}/ is in." if "." in module else
                     f"A file elsewhere is named with its folder: {OPTION} FOLDER/{module}.py")  # fmt: skip
        raise UserError(f"{said}: there is no module {error.name!r} here or among the installed "
                        f"packages.{nearest(module, files)} {elsewhere}") from None  # fmt: skip
    except (Exception, SystemExit) as error:
        raise _failed(said, error) from error


def place_in(error: BaseException) -> str | None:
    """FILE:LINE of the user's code in which an error came about, or through which; None where no such code ran."""
    here = os.path.dirname(__file__)
    files = [(one.filename, one.lineno) for one in traceback.extract_tb(error.__traceback__)]
    own = [f"{file}:{line}" for file, line in files if not (
        file.startswith(("<", here)) or "-packages" in file or of_python(file))]  # fmt: skip
    return own[-1] if own else None


def _failed(said: str, error: BaseException) -> UserError:
    """What went wrong in the code, and in which line of whose file."""
    if isinstance(error, SyntaxError):
        return UserError(f"{said} cannot be imported: {error.filename}:{error.lineno}: {error.msg}.")
    place = place_in(error)
    where = f"{place}: " if place else ""
    what = "it ends the program (sys.exit)" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
    return UserError(f"{said} cannot be imported: {where}{what}")


def of_python(file: str) -> bool:
    """Whether the file is of Python's own library."""
    return file.startswith(os.path.dirname(os.__file__))
