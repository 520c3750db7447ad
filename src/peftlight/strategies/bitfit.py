"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models.

Elad Ben Zaken, Shauli Ravfogel, Yoav Goldberg, 2021, https://arxiv.org/abs/2106.10199
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from peftlight.blocks import blocks_for
from peftlight.errors import UserError
from peftlight.paths import heads_of, own_parameters
from peftlight.strategy import PEFTStrategy


@dataclass
class BitFit(PEFTStrategy):
    """Train the bias vectors of the base and nothing else (section 3 of the paper: all bias terms b)."""

    biases: Literal["all", "query+mlp"] = "all"
    """Which biases: all, or the paper's subset b_q and b_m2, of the query and of the feed-forward's inner layer."""

    def train(self, model: nn.Module) -> Iterable[str]:
        parameters = dict(own_parameters(model))
        if self.biases == "all":
            names = [name for name in parameters if _is_bias(name)]
        else:
            names = [f"{layer}.bias" for layer in _queries_and_inner_layers(model) if f"{layer}.bias" in parameters]
        heads = tuple(f"{head}." for head in heads_of(model))
        if all(name.startswith(heads) for name in names):  # those of a new head, at most
            raise UserError(
                f"BitFit trains biases, and this {type(model).__name__} has none "
                "(the layers of Llama and its relatives are built without). Choose LoRA instead."
            )
        return names


def _is_bias(name: str) -> bool:
    leaf = name.rpartition(".")[2]
    return leaf == "bias" or leaf.endswith("_bias") or leaf.startswith("bias_")


def _queries_and_inner_layers(model: nn.Module) -> list[str]:
    names: list[str] = []
    for block in blocks_for("BitFit with biases query+mlp", model):
        for attention in block.attentions:
            if attention.query is None:
                raise UserError(
                    f"BitFit's biases 'query+mlp' need a query layer of its own, but {attention.fused} makes queries, "
                    "keys and values at once. Choose biases: all."
                )
            names.append(attention.query)
        names += block.feed_forward.inputs if block.feed_forward else ()
    return names
