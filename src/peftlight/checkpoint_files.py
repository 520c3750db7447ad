"""Checkpoints on the disk: written whole or not at all, and known again when they are damaged."""

import hashlib
import pickle
import re
import struct
import time
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from peftlight.errors import UserError
from peftlight.files import write_atomically

SUFFIX = ".ckpt"
_MARK = b"peftlight sha256 "
_DIGEST = hashlib.sha256().digest_size
_SEAL = struct.Struct(f"<{len(_MARK)}sq{_DIGEST}s")
"""How a checkpoint ends: a mark, the time in nanoseconds, the checksum of all that stands before it.

torch writes zip archives, and an archive may end with a comment: every reader of checkpoints takes the file as it is.
"""
_BLOCK = 1 << 22
_ANOTHER = " Use another checkpoint of the run: --resume RUN finds the newest whole one."


def write_checkpoint(content: dict[str, Any], path: str | Path) -> None:
    """Write a checkpoint of plain values and tensors; what is at `path` stays until the new one is whole on the disk.

    Raises:
        UserError: the disk is full or the file cannot be written, or the content holds other objects, which could not
            be read again.
    """
    write_atomically(path, lambda temporary: _write(content, temporary, Path(path)))


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The plain values and the tensors of a checkpoint, these on the CPU.

    Raises:
        UserError: there is no such file, it is damaged, or it holds other objects, which would have to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    try:
        with open(path, "rb") as file:
            seal = _seal(path)
            if seal is not None and _checksum(file, path.stat().st_size - _DIGEST) != seal[1]:
                raise UserError(f"The checkpoint {path} is damaged: its content does not have the checksum with which "
                                f"it was written.{_ANOTHER}")  # fmt: skip
            file.seek(0)
            return _loaded(file, path)
    except OSError as error:
        raise UserError(f"The checkpoint {path} cannot be read: {error.strerror or error}.{_ANOTHER}") from error


def newest_whole(folder: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """The checkpoint of the folder that was written last, of those from which a training can go on, and its content.

    A damaged one, and one that holds the weights alone, is passed over; what is to be said of these comes third.

    Raises:
        UserError: there is none.
    """
    wrong: list[str] = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), key=_written, reverse=True):
        try:
            if "optimizer_states" in (content := read_checkpoint(path)):
                return path, content, [f"{passed} Used instead: {path}" for passed in wrong]
            wrong.append(f"The checkpoint {path} holds the weights alone.")
        except UserError as error:
            wrong.append(str(error).removesuffix(_ANOTHER))
    found = "\n  ".join(["", *wrong]) if wrong else " It holds no checkpoint."
    raise UserError(f"There is nothing in {folder} from which a training could go on.{found}")


def written_after(checkpoint: Path) -> list[Path]:
    """The other checkpoints of the folder that are newer."""
    moment = _written(checkpoint)
    return sorted(path for path in checkpoint.parent.glob(f"*{SUFFIX}") if _written(path) > moment)


class AtomicCheckpoints(CheckpointIO):
    """Lightning's checkpoints, written and read as here: `Trainer(plugins=[AtomicCheckpoints()])`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if weights_only is False:
            raise UserError(f"weights_only is false, so the checkpoint {path} could run code: leave it out.")
        return read_checkpoint(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def _write(content: dict[str, Any], temporary: Path, path: Path) -> None:
    with open(temporary, "wb+") as file:
        _archive(content, file, path)
        file.seek(-2, 2)
        file.write(_SEAL.size.to_bytes(2, "little"))  # the length of the comment ends an archive without one
        file.write(_MARK + struct.pack("<q", _now(path.parent)))
        size = file.tell()
        file.seek(0)
        digest = _checksum(file, size)
        file.seek(size)
        file.write(digest)
    try:
        torch.load(temporary, weights_only=True, mmap=True)  # the values; the tensors stay on the disk
    except pickle.UnpicklingError as error:
        raise UserError(_not_plain(path, error)) from error


def _archive(content: dict[str, Any], file: IO[bytes], path: Path) -> None:
    try:
        torch.save(content, file)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(_not_plain(path, error)) from error
    except RuntimeError as error:  # what torch says when the file fails under its hands
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _not_plain(path: Path, error: Exception) -> str:
    return (f"The checkpoint {path} could not be read again, so it was not written: it would hold {_odd(error)}. "
            "States of callbacks, schedules and data modules have to be tensors and plain values.")  # fmt: skip


def _loaded(file: IO[bytes], path: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn file makes torch raise many unrelated kinds
        if "GLOBAL" not in str(error):
            raise UserError(f"{path} is no checkpoint, or is damaged.{_ANOTHER}") from None
        raise UserError(f"The checkpoint {path} is refused: it holds {_odd(error)}, not only tensors and plain values, "
                        "and reading it would run code that it names. Use a checkpoint that peftlight wrote, or begin "
                        "from the run's adapter: --init_adapter FOLDER") from None  # fmt: skip
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path} is no checkpoint: it has no state_dict.")
    return content


def _odd(error: Exception) -> str:
    """What torch can not pickle, or not read without running code, as its message names it."""
    named = re.search(r"GLOBAL (\S+)|[Cc]an't pickle ([^:]+)|[Cc]annot pickle ([^:]+)", str(error))
    return next(filter(None, named.groups())) if named else " ".join(str(error).split())[:200]


def _seal(path: Path) -> tuple[int, bytes] | None:
    """When the checkpoint was written, and its checksum; none in one that is torn, unreadable or another program's."""
    try:
        if path.stat().st_size < _SEAL.size:
            return None
        with open(path, "rb") as file:
            file.seek(-_SEAL.size, 2)
            mark, written, digest = _SEAL.unpack(file.read())
    except OSError:
        return None
    return (written, digest) if mark == _MARK else None


def _written(path: Path) -> int:
    seal = _seal(path)
    return path.lstat().st_mtime_ns if seal is None else seal[0]  # copying changes the file's own time


def _now(folder: Path) -> int:
    """The time; after that of every checkpoint in the folder, also where the clock was set back."""
    sealed = filter(None, map(_seal, folder.glob(f"*{SUFFIX}")))
    return max([time.time_ns(), *(1 + written for written, _ in sealed)])


def _checksum(file: IO[bytes], size: int) -> bytes:
    """Of the next `size` bytes."""
    digest = hashlib.sha256()
    while size > 0 and (block := file.read(min(size, _BLOCK))):
        digest.update(block)
        size -= len(block)
    return digest.digest()
