"""Merging with proof: base and adapter become one plain model on the disk, and a certificate says what it computes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.errors import UserError, listed
from peftlight.files import as_os_error, write_folder
from peftlight.interop.json_files import as_json
from peftlight.interop.tensor_files import sha256
from peftlight.merging.certificate import TOLERANCES, Certificate, origins, remarks_on
from peftlight.merging.folding import check_folding, check_loaded, digests, noted_calls
from peftlight.merging.plain_model import plain_model, write_model
from peftlight.merging.probes import Difference, Probes, answers, difference, has_classes
from peftlight.paths import own_parameters
from peftlight.pretrained import without_remarks
from peftlight.strategy import Adapter

CERTIFICATE = "merge.json"


def save_merged(
    adapter: Adapter,
    folder: str | Path,
    probes: Probes,
    *,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    source: str | Path | None = None,
    base: tuple[str | None, str | None] = (None, None),
    beside: Sequence[Any] = (),
    overwrite: bool = False,
    shard_size: str = "5GB",
    free: bool = False,
    as_trained: Sequence[Tensor] = (),
) -> Certificate:
    """Write the adapter's model with the adapter folded in, as plain transformers loads it, and prove it.

    Each folded weight is compared with its delta before it is rounded, see `peftlight.merging.folding`; the scores of
    the model as it is are compared with those of the folder that was written, loaded again by transformers in the
    number format written. The folder gets its name only after that, so a failure leaves nothing.

    Args:
        adapter: on its model, in use, not merged; both are left as they are.
        folder: where the model goes; new or empty.
        probes: what both are asked.
        dtype: number format of the written weights; none: that of the base.
        tolerance: the largest difference allowed, as a share of the largest score; none: `TOLERANCES`.
        source: the adapter's own folder, whose files' hashes go into the certificate.
        base: name and revision of the base, for the certificate; without a name that of the model's config.
        beside: what else goes into the folder: a tokenizer, an image processor.
        overwrite: whether a merged model that is there already may be replaced.
        shard_size: the most that one file of weights holds.
        as_trained: the answers to the probes on a quantized base, if the adapter was trained on one.
        free: give up the model's memory before the written one is loaded; the model is of no use afterwards.

    Raises:
        UserError: the adapter cannot be folded, the difference is beyond the tolerance, or the folder cannot be
            written; what was there is as it was.
    """
    folder, model = Path(folder), adapter.model
    check_target(folder, overwrite)
    own = next((p.dtype for _, p in own_parameters(model) if p.is_floating_point()), torch.float32)
    dtype = dtype or own
    plain = plain_model(adapter, dtype)
    with noted_calls(adapter) as calls:
        expected = answers(model, probes)
    folding, written = check_folding(adapter, plain.state, calls), digests(plain.state)
    effect, told = _effect(adapter, probes, expected), origins(adapter, source, base)
    made: list[Certificate] = []

    def write(temporary: Path) -> None:
        write_model(adapter, plain, temporary, dtype, shard_size)
        for each in beside:
            _save(each, temporary)
        if free:
            model.to("meta")
            adapter.originals.clear()
        again = _loaded(model, temporary, dtype)
        check_loaded(again, written, dtype)
        found_again = answers(again, probes)
        gap = difference(expected, found_again, has_classes(model))
        quantized = difference(as_trained, found_again, has_classes(model)) if as_trained else None
        found = Certificate(
            **told, dtype=str(dtype).removeprefix("torch."), difference=gap, effect=effect,
            quantized=quantized,
            tolerance=_tolerance(own, dtype) if tolerance is None else tolerance,
            changed=plain.changed, lost=plain.lost, untied=plain.untied, prompts=probes.texts,
            remarks=remarks_on(plain, adapter, source, gap, effect), files=_hashes(temporary), folding=folding,
        )  # fmt: skip
        found.refuse(folder)
        (temporary / CERTIFICATE).write_text(as_json(found.as_plain()), encoding="utf-8")
        made.append(found)

    write_folder(folder, write, replace=overwrite)
    return made[0]


def check_target(folder: Path, overwrite: bool) -> None:
    """See that a merged model may be written to the folder.

    Raises:
        UserError: something is there that would be lost.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; expected the name of a new folder.")
    there = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if there and not overwrite:
        replaced = ", or, if the merged model there may be replaced: --overwrite true" if CERTIFICATE in there else "."
        raise UserError(f"{folder} is not empty ({listed(there, 4)}). Choose another folder{replaced}")
    if there and CERTIFICATE not in there:
        raise UserError(f"{folder} is not replaced: it has no {CERTIFICATE}, so it is no merged model "
                        f"({listed(there, 4)}). Choose another folder.")  # fmt: skip


def _tolerance(one: torch.dtype, other: torch.dtype) -> float:
    return TOLERANCES[max(one, other, key=lambda each: torch.finfo(each).eps)]


def _effect(adapter: Adapter, probes: Probes, expected: Sequence[Tensor]) -> Difference | None:
    """How far the adapter is from the base alone."""
    if not (adapter.strategy.restorable or adapter.originals):
        return None  # the base was trained over, and no copy kept
    with adapter.disabled():
        bare = answers(adapter.model, probes)
    if any(a.shape != b.shape for a, b in zip(expected, bare, strict=True)):
        return None  # the adapter brought a head with other classes
    return difference(expected, bare, has_classes(adapter.model))


def _loaded(model: nn.Module, folder: Path, dtype: torch.dtype) -> nn.Module:
    """What transformers makes of the folder, on the device of the model."""
    kind: Any = type(model)
    with without_remarks():  # of tensors that its config calls tied and the files hold apart: the certificate says so
        again, info = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, local_files_only=True)
    if strays := [f"{what}: {listed(sorted(map(str, keys)))}" for what, keys in info.items() if keys]:
        raise UserError(f"What was written of this {kind.__name__} does not come back whole; {'; '.join(strays)}.")
    device = next(model.parameters()).device
    moved: nn.Module = again if device.type == "meta" else again.to(device)
    return moved


def _save(what: Any, folder: Path) -> None:
    try:
        what.save_pretrained(folder)
    except Exception as error:  # tokenizers, in Rust, has no errors of the disk
        raise as_os_error(error) from error


def _hashes(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in paths}
