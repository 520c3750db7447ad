"""What a merge proves of itself: what went in, what was written, and how far the two are apart."""

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from peftlight import __version__
from peftlight.errors import listed
from peftlight.interop.base_hash import fingerprint
from peftlight.interop.folder import CONFIG, find_adapter, read_record
from peftlight.interop.hf.frame import base_name
from peftlight.interop.metadata import FILE
from peftlight.interop.tensor_files import TENSORS, sha256
from peftlight.merging.folding import NotTheSame
from peftlight.merging.plain_model import PlainModel, stays_tied
from peftlight.merging.probes import Difference
from peftlight.strategy import Adapter
from peftlight.strategy_spec import spec_of

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""The largest difference that passes, as a share of the largest score, by the coarser of the two number formats.

Right merges of 23 recipes on six tiny models, of an encoder of 22 M and of a language model of 135 M parameters in 30
layers reached 2.5e-6, 4.6e-3 and 5.2e-2: twice to four times that is allowed. All but the first is rounding: the base
itself, written in bfloat16, is as far from itself.
"""
_PACKAGES = ("torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Certificate:
    """What was merged, what was written, and how far the written model is from base and adapter."""

    base: dict[str, Any]
    """Its name, revision, number format, and the hash of its weights as `base_hash.Fingerprint` has it."""
    adapter: dict[str, Any]
    """Its strategy, and the sha256 of its files."""
    dtype: str
    """The number format written."""
    difference: Difference
    """Between base and adapter, and the written model."""
    effect: Difference | None
    """Between base and adapter, and the base alone; None where the base alone is not there, or has other classes."""
    tolerance: float
    """What `difference.relative` may be at most."""
    changed: float | None
    lost: float | None
    """These two and the next are those of `PlainModel`."""
    untied: list[str]
    prompts: list[str]
    """What both were asked; none where they were asked images of noise."""
    quantized: Difference | None = None
    """Between the adapter on the quantized base that it was trained on, and the written model; None: it was plain."""
    remarks: list[str] = field(default_factory=list)
    """What else is to be known of the result."""
    files: dict[str, str] = field(default_factory=dict)
    """The sha256 of each file written."""
    folding: float | None = None
    """What `folding.check_folding` found before anything was rounded."""

    @property
    def passes(self) -> bool:
        """Whether the difference is within the tolerance; one that is no number is not."""
        return self.difference.relative <= self.tolerance

    def as_plain(self) -> dict[str, Any]:
        """As it is written to `merge.json`."""
        return {
            **vars(self),
            "difference": self.difference.as_plain(),
            "effect": self.effect and self.effect.as_plain(),
            "quantized": self.quantized and self.quantized.as_plain(),
            "verdict": "within the tolerance" if self.passes else "beyond the tolerance",
            "versions": {"peftlight": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
        }

    def refuse(self, folder: Path) -> None:
        """See that the model may be kept.

        Raises:
            NotTheSame: it is too far from base and adapter.
        """
        if self.passes:
            return
        gap = self.difference
        same = "" if gap.agreement is None else f" {gap.agreement:.1%} of {gap.places} places have the same best class."
        raise NotTheSame(
            f"{folder} is not written: the merged model does not compute what base and adapter do. The scores differ "
            f"by {gap.largest:.3g} at most, {gap.relative:.2e} of the largest score {gap.scale:.4g} (allowed: "
            f"{self.tolerance:g}), and by {gap.mean:.3g} on average.{same}{self._cause()}"
        )

    def _cause(self) -> str:
        if self.dtype != "float32":
            return f" Written in {self.dtype}, weights are rounded: --dtype float32 keeps them as they are."
        if self.untied:
            return f" {listed(self.untied, 3)} are one tensor in the base, and this architecture may keep them so."
        return ""


def origins(adapter: Adapter, source: str | Path | None, base: tuple[str | None, str | None]) -> dict[str, Any]:
    """The certificate's fields about base and adapter.

    Args:
        adapter: on its model.
        source: the folder that it was loaded from.
        base: name and revision; without a name that of the model's config.
    """
    print_of = fingerprint(adapter)
    told: dict[str, Any] = {"strategy": spec_of(adapter.strategy), "trained": adapter.trained}
    if source is not None:
        folder = find_adapter(Path(source))
        told["files"] = {name: sha256(folder / name) for name in (CONFIG, TENSORS, FILE) if (folder / name).is_file()}
        told["trained_on"] = read_record(folder).base.weights
    name = base[0] or base_name(adapter.model) or None
    return {
        "base": {"name": name, "revision": base[1], "dtype": print_of.dtype, "weights": print_of.weights},
        "adapter": told,
    }


def remarks_on(
    plain: PlainModel, adapter: Adapter, source: str | Path | None, gap: Difference, effect: Difference | None
) -> list[str]:
    """What a reader of the figures should not overlook."""
    remarks = []
    if effect is not None and gap.mean > effect.mean / 4:
        remarks.append(
            f"Rounding moves the scores by {gap.mean:.2g} on average, the adapter itself by {effect.mean:.2g}. If that "
            "is too much, write float32, or keep the adapter beside its base."
        )
    if plain.untied and stays_tied(adapter.model.config):
        remarks.append("transformers 5 keeps apart what its config calls tied, with a warning; version 4 would tie it.")
    if source is not None and read_record(source).base.dtype in ("uint8", "int8"):
        remarks.append("The adapter was trained on a quantized base; beside that one it computes something else.")
    return remarks
