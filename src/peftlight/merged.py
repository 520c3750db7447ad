"""A merge from folder to folder: an adapter's, opened on its base, and the one plain model's."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from peftlight.errors import UserError
from peftlight.interop import read_record
from peftlight.merging.certificate import Certificate
from peftlight.merging.merging import check_target, save_merged
from peftlight.merging.plain_model import refuse_quantized_config
from peftlight.merging.probes import PROMPTS, Probes, answers, image_probes, reads_images, text_probes
from peftlight.opened import Opened, named_folders, open_adapters
from peftlight.opening import Opening
from peftlight.pretrained import Source


def merged(
    adapter: str,
    out: str,
    opening: Opening,
    dtype: str | None = None,
    tolerance: float | None = None,
    prompts: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> tuple[Certificate, str]:
    """Write the merged model, with the arguments of `merge`.

    Returns:
        The certificate, and the class of transformers that loads the model.

    Raises:
        NotTheSame: what was to be written does not compute what base and adapter do.
        UserError: the adapter cannot be merged, or the folder cannot be written.
    """
    check_target(Path(out), overwrite)
    texts = _lines_of(prompts) if prompts else None
    (folder,) = named_folders([adapter]).values()
    opened = _opened(folder, opening)
    probes, beside = _probes_and_companions(opened, texts, tokenizer)
    as_trained = _as_trained(folder, probes, opening)
    written = getattr(torch, dtype) if dtype else None
    certificate = save_merged(
        next(iter(opened.adapters)), out, probes, dtype=written, tolerance=tolerance, source=folder,
        base=(opened.source.name, opened.source.revision), beside=beside, overwrite=overwrite, free=True,
        as_trained=as_trained,
    )  # fmt: skip
    return certificate, opened.auto_class


def _opened(folder: Path, opening: Opening) -> Opened:
    """The base in the number format in which the adapter was trained on it, with the adapter in use."""
    record = read_record(folder).base
    name = opening.base or record.name
    if name is None:
        raise UserError(f"{folder} does not say which base it was trained on: give it with --base.")
    revision = opening.revision or (None if opening.base else record.revision)
    source = Source(name, revision, opening.trust_remote_code)
    refuse_quantized_config(source.load_config(), name)  # before bitsandbytes asks for a GPU
    known: dict[str | None, Any] = {each: each for each in ("float32", "bfloat16", "float16")}
    opened = open_adapters([str(folder)], replace(opening, dtype=known.get(record.dtype, "auto")))
    opened.adapters.use(*opened.adapters.names)
    return opened


def _as_trained(folder: Path, probes: Probes, opening: Opening) -> list[Any]:
    """The answers on the quantized base that the adapter was trained on; none where it was a plain one."""
    if read_record(folder).base.quantization is None:
        return []
    opened = open_adapters([str(folder)], opening)
    opened.adapters.use(*opened.adapters.names)
    return answers(opened.model, probes)


def _probes_and_companions(opened: Opened, texts: list[str] | None, tokenizer: str | None) -> tuple[Probes, list[Any]]:
    """What the models are asked, and what is written beside the weights."""
    if not reads_images(opened.model):
        words = Source(tokenizer).load_tokenizer() if tokenizer else opened.tokenizer
        return text_probes(opened.model, words, texts or PROMPTS), [words]
    if texts is not None:
        raise UserError(f"--prompts: this {type(opened.model).__name__} reads images; it is asked images of noise.")
    return image_probes(opened.model), _image_processor(opened)


def _image_processor(opened: Opened) -> list[Any]:
    try:
        return [opened.source.load_image_processor()]
    except UserError:
        print(f"{opened.source.name} has no image processor, so none is written.", file=sys.stderr)
        return []


def _lines_of(file: str) -> list[str]:
    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {file} cannot be read as text: {error}.") from None
    if not lines:
        raise UserError(f"--prompts: {file} has no line; expected one prompt in each.")
    return lines
