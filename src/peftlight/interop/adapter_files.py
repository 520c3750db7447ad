"""The folder of an adapter: written so that a failure leaves the earlier one whole, and read strictly."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from peftlight.delta import unchanged_on_error
from peftlight.errors import UserError, listed
from peftlight.files import write_atomically
from peftlight.interop import hf_adalora, hf_peft, metadata, own_format
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.strategies.adalora import AdaLoRA
from peftlight.strategies.lora import LoRA
from peftlight.strategy import Adapter, PEFTStrategy, attach

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"

# One row for each method that is exchanged with HF PEFT; everything else goes through our own format.
_WRITERS: dict[type[PEFTStrategy], Callable[[Adapter], tuple[Config, Tensors]]] = {
    AdaLoRA: hf_adalora.to_peft,
    LoRA: hf_peft.to_peft,
}
_READERS: dict[str, Callable[[Config, Tensors, nn.Module, str], Contents]] = {
    "ADALORA": hf_adalora.from_peft,
    "LORA": hf_peft.from_peft,
}


def save_adapter(adapter: Adapter, folder: str | Path) -> None:
    """Write the adapter's config, tensors and origin into `folder`; in HF PEFT's format for LoRA and AdaLoRA.

    What only training needed (the network that makes a prefix, say) is left out: see `Adapter.finished`.

    An adapter that is there already is replaced once all of the new one is on the disk. The same adapter gives the
    same bytes.

    Raises:
        UserError: a value is not finite, the files cannot be written, or their format cannot express the adapter.
    """
    folder, recipe = Path(folder), adapter.strategy
    adapter = adapter.finished()
    write = _WRITERS.get(type(adapter.strategy), own_format.to_own)
    if not adapter.state():
        raise UserError(f"The adapter {adapter.name!r} holds nothing to save; it may have been removed.")
    config, tensors = write(adapter)
    _check_finite(tensors, f"The adapter {adapter.name!r} is not saved")
    text = metadata.as_json(config)

    # Each file is renamed after the one within it, so all of them are whole on the disk before the first is.
    def tensors_then_rest(temporary: Path) -> None:
        _save_tensors(tensors, temporary)
        origin = metadata.as_json(metadata.describe(adapter, recipe, _sha256(temporary)))
        write_atomically(folder / CONFIG, lambda config_file: text_then_origin(config_file, origin))

    def text_then_origin(temporary: Path, origin: str) -> None:
        _write_through(temporary, text)
        write_atomically(folder / metadata.FILE, lambda file: file.write_text(origin, encoding="utf-8"))

    write_atomically(folder / TENSORS, tensors_then_rest)


def load_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> Adapter:
    """Put the adapter in `folder`, one of ours or a LoRA or AdaLoRA of HF PEFT's, on `model`.

    As after `attach`, the base is frozen and all that the adapter owns is trainable. What is trained in place keeps
    the precision of the file: in a half-precision base, a head saved in float32 becomes float32, and the model then
    computes under autocast.

    Raises:
        UserError: the files are missing, damaged, not supported, or do not fit the model, which is as it was.
    """
    folder = Path(folder)
    with unchanged_on_error(model):
        try:
            config, tensors = _read(folder)
            contents = _reader(config)(config, tensors, model, name)
            adapter = attach(model, contents.strategy, name, modules_to_train=contents.modules_to_train)
            _fill(adapter, contents.state)
        except UserError as error:
            raise UserError(f"Cannot load the adapter in {folder}: {error}") from None
    return adapter


def _reader(config: Config) -> Callable[[Config, Tensors, nn.Module, str], Contents]:
    kind = str(config.get("peft_type"))
    if kind.startswith(own_format.TYPE_PREFIX):
        return own_format.from_own
    if kind not in _READERS:
        raise UserError(
            f"peft_type is {config.get('peft_type')!r} in {CONFIG}. Of HF PEFT's types, "
            f"{listed(sorted(_READERS))} can be read."
        )
    return _READERS[kind]


def _fill(adapter: Adapter, state: Tensors) -> None:
    own = adapter.state()
    if {key: value.shape for key, value in own.items()} == {key: value.shape for key, value in state.items()}:
        for key, parameter in adapter.parameters().items():
            if parameter.dtype in (torch.float16, torch.bfloat16) and state[key].dtype == torch.float32:
                parameter.data = parameter.data.float()
    adapter.load_state(state, TENSORS)


def _read(folder: Path) -> tuple[Config, Tensors]:
    if not folder.is_dir():
        raise UserError("There is no such folder.")
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"It has no {CONFIG}. What is there: {listed(sorted(p.name for p in folder.iterdir())) or '-'}."
        )
    if not (folder / TENSORS).is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        how = "adapter_model.bin is a pickle, which may run code; save it again with safe_serialization=True"
        raise UserError(f"It has no {TENSORS} (safetensors).{f' {how}.' if pickled else ''}")
    config = metadata.read_json(folder / CONFIG)
    if (folder / metadata.FILE).is_file():
        metadata.check(metadata.read_json(folder / metadata.FILE), _sha256(folder / TENSORS), TENSORS)
    try:
        tensors = load_file(folder / TENSORS)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{TENSORS} is damaged or not a safetensors file: {error}.") from None
    _check_finite(tensors, f"{TENSORS} is refused")
    return config, tensors


def _check_finite(tensors: Tensors, what: str) -> None:
    bad = [key for key, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise UserError(
            f"{what}: {len(bad)} of its tensors hold values that are not finite (NaN or infinite): {listed(bad)}."
        )


def _save_tensors(tensors: Tensors, path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(_apart(tensors), path, metadata={"format": "pt"})
    except safetensors.SafetensorError as error:
        number = str(error).rpartition("os error ")[2].rstrip(")")
        code = int(number) if number.isdecimal() else 0
        raise OSError(code, os.strerror(code) if code else str(error)) from error
    path.chmod(mode)  # safetensors gives its files to their owner alone
    _sync(path)


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


def _write_through(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
