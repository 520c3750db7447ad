"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.

Elad Ben Zaken, Shauli Ravfogel, Yoav Goldberg, 2021, https://arxiv.org/abs/2106.10199
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from peftlight.errors import UserError
from peftlight.strategy import PEFTStrategy


@dataclass
class BitFit(PEFTStrategy):
    """Train the bias vectors of the base and nothing else (section 3 of the paper: all bias terms b)."""

    def train(self, model: nn.Module) -> Iterable[str]:
        biases = [name for name, _ in model.named_parameters() if _is_bias(name)]
        if not biases:
            raise UserError(
                f"BitFit trains biases, and this {type(model).__name__} has none "
                "(the layers of Llama and its relatives are built without). Choose LoRA instead."
            )
        return biases


def _is_bias(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")
