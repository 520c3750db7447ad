"""`peftlight merge`: base and adapter become one plain model."""

from typing import TYPE_CHECKING, Any, Literal

from peftlight.opening import Opening

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.table import Table

    from peftlight.merging.certificate import Certificate
    from peftlight.merging.probes import Probes
    from peftlight.opened import Opened


def merge(
    adapter: str,
    out: str,
    opening: Opening,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    tolerance: float | None = None,
    prompts: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> None:
    """Write base and adapter as one plain model of transformers, with a certificate that it computes the same.

    The folder that was written is loaded again by transformers and asked the same as base and adapter. If the answers
    are further apart than the tolerance, nothing is kept. The figures go into merge.json beside the weights.

    Args:
        adapter: folder of the adapter or of the run that trained it.
        out: the model's folder; new or empty.
        dtype: number format of the written weights; none: that in which the base was trained on.
        tolerance: the largest difference of two scores, as a share of the largest score; none: 1e-5 in float32,
            0.02 in float16, 0.1 in bfloat16.
        prompts: a text file whose lines (at most 64) are asked instead of eight shipped prompts; images are noise.
        tokenizer: whose tokenizer is written beside, if the base comes without.
        overwrite: whether a merged model that is in the folder may be replaced.
        opening: the base, and what is allowed.
    """
    from pathlib import Path

    import torch

    from peftlight.console import say
    from peftlight.handover.serving import serving_lines
    from peftlight.merging.merging import check_target, save_merged
    from peftlight.opened import named_folders

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
    say(_table(certificate))
    say(f"\nTo load it: transformers.{opened.auto_class}.from_pretrained({out!r}, dtype={certificate.dtype!r})")
    say("\n".join([*serving_lines(out), f"# The hub\npeftlight push {out} USER/NAME"]))


def _opened(folder: "Path", opening: Opening) -> "Opened":
    """The base in the number format in which the adapter was trained on it, with the adapter in use."""
    from dataclasses import replace

    from peftlight.errors import UserError
    from peftlight.interop import read_record
    from peftlight.merging.plain_model import refuse_quantized_config
    from peftlight.opened import open_adapters
    from peftlight.pretrained import Source

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


def _as_trained(folder: "Path", probes: "Probes", opening: Opening) -> list[Any]:
    """The answers on the quantized base that the adapter was trained on; none where it was a plain one."""
    from peftlight.interop import read_record
    from peftlight.merging.probes import answers
    from peftlight.opened import open_adapters

    if read_record(folder).base.quantization is None:
        return []
    opened = open_adapters([str(folder)], opening)
    opened.adapters.use(*opened.adapters.names)
    return answers(opened.model, probes)


def _probes_and_companions(
    opened: "Opened", texts: list[str] | None, tokenizer: str | None
) -> tuple["Probes", list[Any]]:
    """What the models are asked, and what is written beside the weights."""
    from peftlight.errors import UserError
    from peftlight.merging.probes import PROMPTS, image_probes, reads_images, text_probes
    from peftlight.pretrained import Source

    if not reads_images(opened.model):
        words = Source(tokenizer).load_tokenizer() if tokenizer else opened.tokenizer
        return text_probes(opened.model, words, texts or PROMPTS), [words]
    if texts is not None:
        raise UserError(f"--prompts: this {type(opened.model).__name__} reads images; it is asked images of noise.")
    return image_probes(opened.model), _image_processor(opened)


def _image_processor(opened: "Opened") -> list[Any]:
    import sys

    from peftlight.errors import UserError

    try:
        return [opened.source.load_image_processor()]
    except UserError:
        print(f"{opened.source.name} has no image processor, so none is written.", file=sys.stderr)
        return []


def _lines_of(file: str) -> list[str]:
    from pathlib import Path

    from peftlight.errors import UserError

    try:
        lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {file} cannot be read as text: {error}.") from None
    if not lines:
        raise UserError(f"--prompts: {file} has no line; expected one prompt in each.")
    return lines


def _table(certificate: "Certificate") -> "Table":
    from rich.table import Table

    table = Table(title="base and adapter beside what was written", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in _rows(certificate):
        table.add_row(*row)
    return table


def _rows(found: "Certificate") -> "Iterator[tuple[str, str]]":
    gap, base = found.difference, found.base
    at = f" at {base['revision']}" if base["revision"] else ""
    yield "base", f"{base['name']}{at}, {base['dtype']}"
    yield "method", str(found.adapter["strategy"]["class_path"]).rpartition(".")[2]
    yield "written in", found.dtype
    asked = f"{len(found.prompts)} prompts" if found.prompts else "images of noise"
    yield "asked", f"{asked}, {gap.places} places compared"
    yield "largest difference", f"{gap.largest:.3g}, {gap.relative:.2e} of the largest score {gap.scale:.4g}"
    yield "mean difference", f"{gap.mean:.3g}, {gap.relative_mean:.2e} of it"
    if gap.agreement is not None:
        yield "same best class", f"{gap.agreement:.2%}"
    if found.effect is not None:
        yield (
            "the adapter itself",
            f"moves scores by {found.effect.largest:.3g} at most, {found.effect.mean:.3g} on average",
        )
    if found.folding is not None:
        yield "folded, not yet rounded", f"outputs of each module within {found.folding:.1e} of those with its delta"
    if found.quantized is not None:
        gap = found.quantized
        yield (
            "from the quantized run",
            f"{gap.largest:.3g} at most, {gap.mean:.3g} on average, "
            + ("" if gap.agreement is None else f"{gap.agreement:.2%} the same best class"),
        )
    if found.changed is not None:
        yield "change of the weights", f"{found.changed:.2e} of the norm of what is changed"
    if found.lost:
        yield "lost to rounding", f"{found.lost:.2e} of the change"
    if found.untied:
        yield "no longer tied", ", ".join(found.untied)
    for remark in found.remarks:
        yield "note", remark
    yield "verdict", f"within the tolerance {found.tolerance:g}; merge.json has all of this and the files' sha256"
