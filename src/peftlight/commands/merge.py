"""`peftlight merge`: base and adapter become one plain model."""

from typing import Literal

from peftlight.opening import Opening


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

    from peftlight.console import say
    from peftlight.handover.serving import serving_lines
    from peftlight.merged import merged
    from peftlight.merging.table import table_of

    certificate, auto_class = merged(adapter, out, opening, dtype, tolerance, prompts, tokenizer, overwrite)
    say(table_of(certificate))
    say(f"{Path(out) / 'merge.json'} has all of this and the files' sha256")
    say(f"\nTo load it: transformers.{auto_class}.from_pretrained({out!r}, dtype={certificate.dtype!r})")
    say("\n".join([*serving_lines(out), f"# The hub\npeftlight push {out} USER/NAME"]))
