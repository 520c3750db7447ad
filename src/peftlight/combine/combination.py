"""One adapter of several on the same base: Σ wᵢ ΔWᵢ and its relatives, as an ordinary LoRA."""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlight.combine.methods import DENSITIES, METHODS, Settings, truncated
from peftlight.combine.result import made
from peftlight.delta import Factors
from peftlight.errors import UserError, listed, nearest
from peftlight.matrices import Matrix
from peftlight.paths import heads_of, inside, output_embedding
from peftlight.strategy import Adapter, adapters_on
from peftlight.turns import turn
from peftlight.updates import Updates


@dataclass(frozen=True)
class Combination:
    """An adapter made of others."""

    adapter: Adapter
    """On the model and on; all others there are off."""
    errors: dict[str, float]
    """By module, ‖ΔW - B A‖_F / ‖ΔW‖_F of what the method gave, ΔW, and what its rank could hold of that."""


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    method: str = "sum",
    *,
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    name: str = "combined",
    heads_from: str | None = None,
) -> Combination:
    """Make one adapter of several, which stay on the model; the new one is on, every other one off.

    Updates of weights become a LoRA, exact with `sum`, else the nearest of a rank. What is trained in place (biases,
    norms) changes by what the method makes of the changes. A head that stands outside the pretrained model has no
    common start, so it is taken whole, from the adapter that trains it; of several, from `heads_from`.

    Args:
        adapters: on one model, with different names; what one of them does not change counts as zero there.
        weights: wᵢ, one for each adapter; 1 where none are given.
        method: sum, svd, ties or dare; see `peftlight.combine.methods`.
        rank: of each module's update with svd, ties and dare, at most its smaller side, with which nothing is lost;
            none: the largest that the adapters have there.
        density: share of each update's numbers that is kept by ties (none: 0.2) and dare (none: 0.5).
        seed: of what dare drops: `torch.rand` on the CPU, tensor by tensor in the model's order, adapter by adapter.
        name: of the new adapter.
        heads_from: name of the adapter whose head the new one gets.

    Raises:
        UserError: an adapter does not change weights (a prompt, a bottleneck), or the arguments do not fit.
    """
    weights = [1.0] * len(adapters) if weights is None else weights
    _check(adapters, weights, method, rank, density)
    settings = Settings(density or DENSITIES.get(method, 1.0), torch.Generator().manual_seed(seed))
    with turn(adapters[0].model), torch.no_grad(), _all_off({*adapters, *adapters_on(adapters[0].model)}):
        updates = [Updates(adapter) for adapter in adapters]
        _check_weights_only(updates)
        heads = _heads(updates, heads_from)
        factors: dict[str, Factors] = {}
        values: dict[str, Tensor] = {}
        errors: dict[str, float] = {}
        for tensor in _names(updates, heads):
            having = [(each, weight) for each, weight in zip(updates, weights, strict=True) if tensor in each]
            changes, shares = [each[tensor] for each, _ in having], [weight for _, weight in having]
            total = METHODS[method](changes, shares, settings)
            if any(tensor in each.trained or not tensor.endswith("weight") for each, _ in having):
                values[tensor] = having[0][0].after(tensor, total)
                continue
            site = tensor.rpartition(".")[0]
            factors[site], errors[site] = _of_low_rank(site, total, changes, method, rank)
        return Combination(made(adapters, name, factors, values, heads), errors)


def _check(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str, rank: int | None, density: float | None
) -> None:
    if method not in METHODS:
        raise UserError(f"method is {method!r}.{nearest(method, METHODS)} Expected {listed(METHODS)}.")
    names = [adapter.name for adapter in adapters]
    if not adapters or len(set(names)) < len(names) or len({id(adapter.model) for adapter in adapters}) > 1:
        raise UserError(f"Adapters to combine are on one model and have different names; got {listed(names) or '-'}.")
    if len(weights) != len(adapters) or not all(map(math.isfinite, weights)):
        raise UserError(f"There is one finite weight for each of {listed(names)}; got {listed(weights)}.")
    if rank is not None and (rank < 1 or method == "sum"):
        raise UserError(f"rank is a number from 1 up, for svd, ties and dare; got {rank} with {method}.")
    if density is not None and (not 0 < density <= 1 or method not in DENSITIES):
        raise UserError(f"density is a share above 0 up to 1, for ties and dare; got {density} with {method}.")


@contextmanager
def _all_off(adapters: Collection[Adapter]) -> Iterator[None]:
    """Switch the adapters off; on again if the block fails."""
    used = [adapter for adapter in adapters if adapter.enabled]
    try:
        for adapter in used:
            adapter.disable()
        yield
    except BaseException:
        for adapter in used:
            adapter.enable()
        raise


def _check_weights_only(updates: Sequence[Updates]) -> None:
    for each in updates:
        if each.refused:
            name, kind = each.adapter.name, type(each.adapter.strategy).__name__
            site, why = next(iter(each.refused.items()))
            raise UserError(
                f"The adapter {name!r} ({kind}) cannot be combined with others: at {site or 'the model'}, {why} What "
                "can be combined is what changes weights: LoRA and its relatives, IA3, BitFit, LayerNormTuning."
            )


def _heads(updates: Sequence[Updates], chosen: str | None) -> dict[str, Tensor]:
    """The values of the heads, all from one adapter, by name.

    What trains but the bias of a head, as `bias="all"` does, starts from the base's head as all others do.
    """
    owned = {each.adapter.name: own for each in updates if (own := _whole_heads(each))}
    if chosen is not None and chosen not in owned:
        raise UserError(
            f"heads_from is {chosen!r}.{nearest(chosen, owned)} Heads are trained by {listed(owned) or '-'}."
        )
    paths = {name.rpartition(".")[0] for own in owned.values() for name in own}
    trained = [(each.adapter.name, name) for each in updates for name in each if inside(name, paths)]
    if chosen is None and len(by := {adapter for adapter, _ in trained}) > 1:
        raise UserError(
            f"{listed(sorted(by))} each train a head ({listed(sorted({name for _, name in trained}), 3)}), which began "
            f"at random: a sum of them means nothing. Say whose is kept: heads_from {next(iter(owned))}"
        )
    own = owned.get(chosen or next(iter(owned), ""), {})
    return {name: each.after(name, each[name]) for name, each in own.items()}


def _whole_heads(updates: Updates) -> dict[str, Updates]:
    """What the adapter trains in place of modules outside the pretrained model that it trains whole, by name."""
    model = updates.adapter.model
    pretrained = output_embedding(model)
    heads = {path for path in heads_of(model) if model.get_submodule(path) is not pretrained}
    found: dict[str, Updates] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in updates.trained if inside(name, heads)):
        own = [f"{path}.{leaf}" for leaf, _ in model.get_submodule(path).named_parameters(recurse=False)]
        if all(name in updates.trained for name in own):
            found |= dict.fromkeys(own, updates)
    return found


def _names(updates: Sequence[Updates], heads: Collection[str]) -> list[str]:
    """What is changed by any of the adapters, in the model's order, without the heads."""
    model = updates[0].adapter.model
    changed = {name for each in updates for name in each}
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    every += [name for name, _ in model.named_buffers(remove_duplicate=False)]
    paths = {name.rpartition(".")[0] for name in heads}
    return [name for name in every if name in changed and not inside(name, paths)]


def _of_low_rank(
    site: str, total: Matrix, changes: Sequence[Matrix], method: str, rank: int | None
) -> tuple[Factors, float]:
    """A and B of a module's update, and its relative error."""
    if method == "sum":
        if total.factors is None:
            raise UserError(
                f"At {site} an adapter's update is no product of low rank (DoRA and IA3 have none), so that their sum "
                "is no LoRA. Take the nearest of a rank: method svd, with rank 16, say."
            )
        return total.factors, 0.0
    ranks = [len(change.factors[0]) for change in changes if change.factors is not None]
    if rank is None and not ranks:
        raise UserError(f"At {site} no adapter's update is a product of low rank: say which rank, 16 for example.")
    nearest_one, error = truncated(total, rank or max(ranks))
    assert nearest_one.factors is not None
    return nearest_one.factors, error
