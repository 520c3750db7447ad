"""Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning.

Bingchen Zhao, Haoqin Tu, Chen Wei, Jieru Mei, Cihang Xie, 2023, https://arxiv.org/abs/2312.11420
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from peftlight.errors import UserError, listed
from peftlight.paths import own_modules
from peftlight.strategy import PEFTStrategy
from peftlight.targets import matching


@dataclass
class LayerNormTuning(PEFTStrategy):
    """Train the scales and shifts of the normalisation layers and nothing else."""

    target_modules: list[str] | None = None
    """Names of normalisation layers; none: all of them."""

    def train(self, model: nn.Module) -> Iterable[str]:
        norms = [name for name, module in own_modules(model) if _is_norm(module)]
        if not norms:
            batch = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for _, module in own_modules(model))
            raise UserError(
                f"LayerNormTuning trains normalisations over features, and this {type(model).__name__} has "
                + ("only some over the batch (BatchNorm): choose BitFit, which trains their shifts, or LoRA."
                   if batch else "none with a scale. Choose LoRA instead.")
            )  # fmt: skip
        if self.target_modules is None:
            return norms
        named = matching(model, self.target_modules)
        others = [name for name in named if name not in norms]
        if others:
            raise UserError(
                f"target_modules: {listed(others)} are no normalisation layers. Those of this {type(model).__name__} "
                f"are {listed(norms)}."
            )
        return named


def _is_norm(module: nn.Module) -> bool:
    """Normalisation over features; statistics over the batch (BatchNorm) belong to the frozen base."""
    known = isinstance(module, nn.LayerNorm | nn.GroupNorm) or type(module).__name__.endswith(("LayerNorm", "RMSNorm"))
    return known and getattr(module, "weight", None) is not None
