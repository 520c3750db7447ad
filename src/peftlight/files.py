"""Writing files so that a crash or a full disk never damages what was there before."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from peftlight.errors import UserError

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    Raises:
        UserError: the file cannot be written (disk full, no permission); `path` is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(_explain(path, error)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_folder(path: str | Path, write: Callable[[Path], object], replace: bool = False) -> None:
    """Let `write` fill a temporary folder beside `path`, flush all of it to the disk, then rename it to `path`.

    What is at `path` may be an empty folder; another one gives way only if `replace` is true, and only at the end.

    Raises:
        UserError: the folder cannot be written (disk full, no permission); `path` is as it was.
    """
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write(temporary)
        for each in [*temporary.rglob("*"), temporary]:
            _flush(each)
        _put_in_place(temporary, path, replace)
    except OSError as error:
        raise UserError(_explain(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def as_os_error(error: Exception) -> Exception:
    """The failure of the disk that a library in Rust reports as another kind of error; any other error as it is."""
    number = str(error).rpartition("os error ")[2].partition(")")[0]
    return OSError(int(number), os.strerror(int(number))) if number.isdecimal() else error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _put_in_place(temporary: Path, path: Path, replace: bool) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    if replace and path.exists():
        os.replace(path, aside)
    try:
        os.replace(temporary, path)
    except OSError:
        if aside.exists():
            os.replace(aside, path)
        raise
    _flush(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have the disk hold what was written to the file, or which files the folder holds."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(path: Path, error: OSError) -> str:
    kept = "What was there before is unchanged."
    if error.errno in _NO_ROOM:
        return f"No room left to write {path}: {error.strerror}. {kept} Free some space or choose another folder."
    return f"Cannot write {path}: {error.strerror or error}. {kept}"


def cache_folder(given: str | None = None) -> Path:
    """Where converted models and tokenised data are kept: what is given, `$PEFTLIGHT_CACHE`, or ~/.cache/peftlight."""
    return Path(given or os.environ.get("PEFTLIGHT_CACHE") or "~/.cache/peftlight").expanduser()
