"""The file of an adapter's tensors: safetensors, written through to the disk and read with distrust."""

import hashlib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peftlight.errors import UserError, is_one_line, listed
from peftlight.files import as_os_error, write_atomically
from peftlight.finite import not_finite
from peftlight.interop.contents import Tensors

TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
INDEX = "adapter_model.safetensors.index.json"


def read_tensors(path: Path) -> Tensors:
    """The tensors of a safetensors file or of a pickle, all of them finite, and eight-bit numbers in float32.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    tensors = _unpickled(path) if path.name == PICKLE else _loaded(path)
    # torch can neither compare eight-bit numbers nor tell which of them are finite
    tensors = {key: value.float() if _is_eight_bit(value) else value for key, value in tensors.items()}
    check_names(tensors, path)
    check_finite(tensors, f"{path.name} is refused")
    return tensors


def convert_pickle(folder: str | Path) -> Path:
    """Write the tensors of `adapter_model.bin` to `adapter_model.safetensors` beside it, and return its path.

    Nothing in the pickle is run: torch reads it with `weights_only=True`, as tensors in plain containers.

    Raises:
        UserError: there is no such file, it holds something else, or there are safetensors already.
    """
    pickle, target = Path(folder) / PICKLE, Path(folder) / TENSORS
    if not pickle.is_file():
        raise UserError(f"{folder} has no {PICKLE} to convert.")
    if target.exists():
        raise UserError(f"{folder} has {TENSORS} already, which is what is loaded. Nothing was converted.")
    tensors = read_tensors(pickle)
    write_atomically(target, lambda temporary: save_tensors(tensors, temporary))
    return target


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Write the tensors and flush them to the disk, with the same bytes for the same tensors.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(_apart(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        cause = as_os_error(error)
        raise cause if isinstance(cause, OSError) else OSError(0, str(error)) from error
    path.chmod(mode)  # safetensors gives its files to their owner alone


def check_names(names: Iterable[str], path: Path) -> None:
    """See that the tensors' names can be shown as they are.

    Raises:
        UserError: one has characters that end a line or steer a terminal.
    """
    if odd := [repr(name) for name in names if not is_one_line(name)]:
        raise UserError(f"{path.name} has names of tensors with control characters: {listed(odd, 3)}.")


def check_finite(tensors: Tensors, what: str) -> None:
    """See that there is no NaN and no infinity; `what` begins the message.

    Raises:
        UserError: a tensor has one.
    """
    if bad := not_finite(tensors.items()):
        raise UserError(
            f"{what}: {len(bad)} of its tensors hold values that are not finite (NaN or infinite): {listed(bad)}."
        )


def sha256(path: Path) -> str:
    """The file's checksum, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _is_eight_bit(value: Tensor) -> bool:
    return value.is_floating_point() and value.element_size() == 1


def _loaded(path: Path) -> Tensors:
    try:
        return load_file(path)
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{path.name} is damaged or not a safetensors file: {error}.") from None


def _unpickled(path: Path) -> Tensors:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on archives of other kinds, which it then refuses
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle makes torch raise many unrelated kinds
        named = re.search(r"GLOBAL ([\w.]+)", str(error))  # torch's own text advises to let it run
        what = f"it names {named[1]}, which reading it would run" if named else type(error).__name__
        raise UserError(f"{path.name} is damaged, or holds more than tensors: {what}. It is not read.") from None
    if not isinstance(found, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items()
    ):
        raise UserError(f"{path.name} holds a {type(found).__name__}; expected tensors by their names.")
    odd = [key for key, value in found.items() if value.layout != torch.strided or value.is_quantized]
    if odd:
        raise UserError(f"{path.name} holds sparse or quantized tensors: {listed(odd)}; expected plain ones.")
    return {key: value.detach() for key, value in found.items()}


def _apart(tensors: Tensors) -> dict[str, Tensor]:
    """The tensors, contiguous, and none sharing memory with another: safetensors refuses that."""
    seen: set[int] = set()
    apart = {}
    for key, value in tensors.items():
        value = value.contiguous()
        memory = value.untyped_storage().data_ptr()
        apart[key] = value.clone() if memory in seen else value
        seen.add(memory)
    return apart
