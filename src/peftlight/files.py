"""Writing files so that a crash or a full disk never damages what was there before."""

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from peftlight.errors import UserError

_ALL_WRITTEN = ".written"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, then rename it to `path`.

    A link stays one. A device or a pipe is written to as it is.

    Raises:
        UserError: the file cannot be written (disk full, no permission); `path` is as it was.
    """
    path = Path(path)
    with naming(path):
        if path.exists() and not (path.is_file() or path.is_dir()):
            write(path)
            return
        target = Path(os.path.realpath(path))
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write(temporary)
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_together(folder: str | Path, files: Mapping[str, Callable[[Path], object]]) -> None:
    """Let each function fill a file for its name, in their order; then all of them take their places in `folder`.

    A crash leaves all files as they were, or all new ones: once the new ones are whole on the disk, a mark says so, and
    from then on `finish_writing` completes what a crash interrupted.

    Raises:
        UserError: a file cannot be written (disk full, no permission); all are as they were.
    """
    folder = at = Path(folder)
    finish_writing(folder, files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in files.items():
            at = folder / name
            write(_new(folder, name))
            _flush(_new(folder, name))
        (folder / _ALL_WRITTEN).touch()
        _flush(folder)
    except OSError as error:
        raise UserError(_explain(at, error)) from error
    finally:
        if not (folder / _ALL_WRITTEN).exists():
            for name in files:
                with contextlib.suppress(OSError):
                    _new(folder, name).unlink()
    finish_writing(folder, files)


def finish_writing(folder: Path, names: Iterable[str]) -> None:
    """Complete a `write_together` of these names that a crash interrupted, if there is one in the folder.

    Raises:
        UserError: the files cannot be put in their places.
    """
    if not (folder / _ALL_WRITTEN).exists():
        return
    try:
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # it is in its place already
                os.replace(_new(folder, name), folder / name)
        _flush(folder)
        (folder / _ALL_WRITTEN).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The files in {folder} were being replaced when a crash came, and cannot be put in their places: "
            f"{error.strerror or error}. Give this program the right to write there."
        ) from error


def _new(folder: Path, name: str) -> Path:
    return folder / f".{name}.new"


def write_folder(path: str | Path, write: Callable[[Path], object], replace: bool = False) -> None:
    """Let `write` fill a temporary folder beside `path`, flush all of it to the disk, then rename it to `path`.

    What is at `path` may be an empty folder; another one gives way only if `replace` is true, and only at the end.

    Raises:
        UserError: the folder cannot be written (disk full, no permission); `path` is as it was.
    """
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # in containers a killed writer had the same number
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            write(temporary)
            for each in [*temporary.rglob("*"), temporary]:
                _flush(each)
            _put_in_place(temporary, path, replace)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_unfinished(folder: Path) -> None:
    """Remove the temporary files and folders of writers that were killed; none may be at work in the folder."""
    for left in folder.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


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
        shutil.rmtree(aside, ignore_errors=True)
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
    except OSError as error:
        if error.errno != errno.EINVAL:  # what disks say that cannot flush a folder
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block a failure of the disk is the user's error, about `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(_explain(path, error)) from error


def _explain(path: Path, error: OSError) -> str:
    kept = "What was there before is unchanged."
    if error.errno in _NO_ROOM:
        return f"No room left to write {path}: {error.strerror}. {kept} Free some space or choose another folder."
    return f"Cannot write {path}: {error.strerror or error}. {kept}"


def cache_folder(given: str | None = None) -> Path:
    """Where converted models and tokenised data are kept: what is given, `$PEFTLIGHT_CACHE`, or ~/.cache/peftlight."""
    return Path(given or os.environ.get("PEFTLIGHT_CACHE") or "~/.cache/peftlight").expanduser()
