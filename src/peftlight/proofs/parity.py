"""The proof that what was trained is what was saved, and what others read."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftlight.errors import listed
from peftlight.interop import read_record
from peftlight.interop.folder import CONFIG
from peftlight.interop.json_files import read_json
from peftlight.interop.own_format import TYPE_PREFIX
from peftlight.merging.certificate import TOLERANCES
from peftlight.merging.probes import Difference, Probes, answers, difference
from peftlight.opened import Opened, open_adapters
from peftlight.opening import Opening
from peftlight.pretrained import without_remarks
from peftlight.proofs.agreement import Outcome
from peftlight.proofs.trainings import Bench, Trained
from peftlight.proofs.witness import ANSWERS

_UNREAD = {
    "ADALORA": "it takes the ranks of the start, and files hold those that were kept",
    "P_TUNING": "it takes no prompts",
    "PREFIX_TUNING": "it takes no prefixes",
    "PROMPT_TUNING": "it takes no prompts",
    "VERA": "it takes no matrices that layers share",
}
"""What transformers (5.23) cannot read though HF PEFT can, by HF PEFT's name of the method."""


def prove_parity(bench: Bench, steps: int) -> Outcome:
    """Train, save, and ask the same of the trained model, of a fresh one with the saved adapter, and of others.

    Raises:
        UserError: the configuration is not right.
    """
    trained = bench.train("trained", steps, {"trainer.devices": 1, "trainer.strategy": "auto"}, ask=True)
    kept = torch.load(trained.kept / ANSWERS, weights_only=True)
    findings = list(_findings(trained, Probes([kept["inputs"]]), kept["scores"]))
    return Outcome(all(finding.holds for finding in findings), "\n  ".join(["", *map(str, findings)]).strip())


@dataclass(frozen=True)
class Finding:
    """Two ways to the same scores."""

    what: str
    apart: Difference | None
    """None: there was nothing to compare."""
    limit: float = 0.0
    """How far the scores may be apart, as a share of the largest."""
    failed: bool = False
    """Whether there are no scores on one of the ways, though there should be."""

    @property
    def holds(self) -> bool:
        """Whether they are as near as they have to be; a NaN is not."""
        if self.apart is None:
            return not self.failed
        return self.apart.largest == 0 or self.apart.relative <= self.limit

    def __str__(self) -> str:
        if self.apart is None:
            return self.what
        if self.apart.largest == 0:
            return f"{self.what}: bit for bit"
        far = f"{self.apart.largest:.3g} at most, {self.apart.relative:.1e} of the largest score"
        return f"{self.what}: {far} (allowed: {self.limit:g})"


def _findings(trained: Trained, probes: Probes, scores: Tensor) -> Iterator[Finding]:
    folder = trained.run / "adapter"
    opened = _opened(trained, folder)
    model, (adapter,) = opened.model, opened.adapters
    limit = max(TOLERANCES[p.dtype] for p in model.parameters() if p.dtype in TOLERANCES)
    opened.adapters.use(adapter.name)
    saved = answers(model, probes)
    opened.adapters.use()
    off = answers(model, probes)
    moved = f"the adapter (it moves scores by {difference(off, saved).largest:.3g} at most)"
    yield Finding(f"loaded from its files, {moved} computes what was trained", difference([scores], saved), limit)
    torch.manual_seed(0)
    bare = opened.base_again()
    yield Finding("switched off, it leaves what the base computes", difference(answers(bare, probes), off))
    yield _read_by_transformers(bare, folder, probes, saved, limit)


def _opened(trained: Trained, folder: Path) -> Opened:
    """The adapter on a fresh base that is held as in the training; the same random numbers in a head that is new."""
    quantized = read_record(folder).base.quantization is not None
    dtype = None if quantized else trained.config()["model"]["init_args"]["dtype"]
    torch.manual_seed(0)
    return open_adapters([str(folder)], Opening(dtype=dtype, trust_remote_code=trained.trusts_code()))


def _read_by_transformers(bare: nn.Module, folder: Path, probes: Probes, saved: list[Tensor], limit: float) -> Finding:
    config = read_json(folder / CONFIG)
    if why := _unread(config):
        return Finding(f"not asked of transformers: {why}", None)
    others = f"transformers {_version('transformers')} and HF PEFT {_version('peft')}"
    reader: Any = bare
    try:
        with without_remarks():
            told = reader.load_adapter(str(folder))
    except Exception as error:  # of many kinds, by the method
        return Finding(f"{others} refuse the files: {str(error).partition(chr(10))[0]}", None, failed=True)
    if strays := sorted([*told.missing_keys, *told.unexpected_keys]):
        return Finding(f"{others} do not find, or do not know: {listed(strays, 3)}", None, failed=True)
    return Finding(f"read by {others}", difference(saved, answers(bare, probes)), limit)


def _unread(config: Mapping[str, Any]) -> str:
    """Why `load_adapter` of transformers is not asked; empty where it is."""
    kind = str(config["peft_type"])
    if kind.startswith(TYPE_PREFIX):
        return f"the format is our own ({kind})"
    if find_spec("peft") is None:
        return "it reads adapters by HF PEFT, which is not installed here (pip install peft)"
    why = "it leaves out DoRA's magnitudes" if config.get("use_dora") else _UNREAD.get(kind)
    return f"{why}; PeftModel.from_pretrained of HF PEFT reads these files" if why else ""


def _version(package: str) -> str:
    return importlib.metadata.version(package)
