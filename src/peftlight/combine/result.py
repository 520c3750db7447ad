"""The adapter that a combination is put into: an ordinary LoRA, with heads, biases and norms trained in place."""

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from peftlight.delta import Delta, Factors, unchanged_on_error
from peftlight.errors import UserError
from peftlight.paths import inside
from peftlight.strategies.lora import LoRA
from peftlight.strategies.lora_layers import EmbeddingLoRA
from peftlight.strategies.stack import Stack
from peftlight.strategy import Adapter, PEFTStrategy, attach


def made(
    adapters: Sequence[Adapter],
    name: str,
    factors: Mapping[str, Factors],
    values: Mapping[str, Tensor],
    heads: Mapping[str, Tensor],
) -> Adapter:
    """The adapter with these updates, and with these values of the base's own tensors."""
    model, ranks = adapters[0].model, {site: len(A) for site, (A, _) in factors.items() if len(A)}
    if not ranks and any(adapter.sites for adapter in adapters):
        raise UserError(
            "Nothing is left to make an adapter of: no update of a module was combined, or all of them are zero."
        )
    biases = [tensor for tensor in values if tensor.endswith(".bias")]
    in_whole = [*heads, *(tensor for tensor in values if tensor not in biases)] if ranks else heads
    whole = dict.fromkeys(_module_with(tensor, adapters) for tensor in in_whole)
    strategy = _lora(ranks, bool(biases)) if ranks else _of_the_base(adapters)
    with unchanged_on_error(model), torch.random.fork_rng(devices=[]):
        made = attach(model, strategy, name, modules_to_train=list(whole), keep_base=True)
    for site, (A, B) in factors.items():
        if site in made.sites:
            _put(made.sites[site], A, B)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for tensor, value in {**values, **heads}.items():
        tensors[tensor].data = value  # a head may have another size than the base's
    return made


def _lora(ranks: Mapping[str, int], biases: bool) -> LoRA:
    """A LoRA of these ranks whose scale is 1 everywhere."""
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(site)}": rank for site, rank in ranks.items() if rank != usual}
    strategy = LoRA(
        rank=usual,
        alpha=usual,
        target_modules=list(ranks),
        rank_pattern=others,
        alpha_pattern=dict(others),
        bias="all" if biases else "none",
    )
    strategy.refuses_wasted_rank = False  # a sum's may be above the layer's width
    return strategy


def _of_the_base(adapters: Sequence[Adapter]) -> PEFTStrategy:
    """What trains all that these adapters, which add nothing to the base, train in it."""
    different: list[PEFTStrategy] = []
    for adapter in adapters:
        if adapter.strategy not in different:
            different.append(copy.deepcopy(adapter.strategy))
    return different[0] if len(different) == 1 else Stack(different)


def _module_with(tensor: str, adapters: Sequence[Adapter]) -> str:
    """The module that holds a tensor; an outer one if that is what an adapter trains whole."""
    own = tensor.rpartition(".")[0]
    return next((path for adapter in adapters for path in adapter.trained if path and inside(own, [path])), own)


def _put(delta: Delta, A: Tensor, B: Tensor) -> None:
    if isinstance(delta, EmbeddingLoRA):
        A, B = B.T, A.T
    for name, value in (("A", A), ("B", B)):
        parameter = delta.get_parameter(name)
        parameter.copy_(value.reshape(parameter.shape))
