"""How several updates of one tensor are made into one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlight.matrices import Matrix, weighted_sum


@dataclass(frozen=True)
class Settings:
    """What the methods can be told."""

    density: float
    """Share of the numbers of each update that is kept."""
    generator: torch.Generator
    """Draws what DARE drops, on the CPU."""


def task_arithmetic(updates: Sequence[Matrix], weights: Sequence[float], settings: Settings) -> Matrix:
    """Σ wᵢ ΔWᵢ, exactly; of products of low rank it is a product whose rank is the sum of theirs.

    Gabriel Ilharco, Marco Tulio Ribeiro, Mitchell Wortsman, Suchin Gururangan, Ludwig Schmidt, Hannaneh Hajishirzi,
    Ali Farhadi, "Editing Models with Task Arithmetic", 2022, https://arxiv.org/abs/2212.04089
    """
    return weighted_sum(updates, weights)


def ties(updates: Sequence[Matrix], weights: Sequence[float], settings: Settings) -> Matrix:
    """Trim, elect a sign, and average those that agree with it, number by number.

    1. Δ'ᵢ: of each ΔWᵢ the share `density` that is largest in magnitude, the rest zero. vᵢ = wᵢ Δ'ᵢ.
    2. γ = sign(Σ vᵢ).
    3. Σ_{i in P} vᵢ / |P| with P = {i: sign(vᵢ) = γ ≠ 0}; 0 where P is empty.

    With all weights alike, w, it is the paper's with λ = w. This acts on ΔW itself, tensor by tensor (the paper trims
    the parameters of a whole model together): A and B apart are not updates, and ties of theirs mean nothing.

    Prateek Yadav, Derek Tam, Leshem Choshen, Colin Raffel, Mohit Bansal, "TIES-Merging: Resolving Interference When
    Merging Models", 2023, https://arxiv.org/abs/2306.01708
    """
    values = torch.stack([w * _largest(u.dense(), settings.density) for u, w in zip(updates, weights, strict=True)])
    elected = values.sum(0).sign()
    agree = (values.sign() == elected) & (elected != 0)
    return Matrix(whole=(values * agree).sum(0) / agree.sum(0).clamp(min=1))


def dare(updates: Sequence[Matrix], weights: Sequence[float], settings: Settings) -> Matrix:
    """Σ wᵢ mᵢ ∘ ΔWᵢ / p: each number of each update is kept with probability p = `density` (mᵢ = 1), or dropped.

    On average it is Σ wᵢ ΔWᵢ. This acts on ΔW itself, not on A and B apart.

    Le Yu, Bowen Yu, Haiyang Yu, Fei Huang, Yongbin Li, "Language Models are Super Mario: Absorbing Abilities from
    Homologous Models as a Free Lunch", 2023, https://arxiv.org/abs/2311.03099
    """
    kept = []
    for update in updates:
        dense = update.dense()
        mask = torch.rand(dense.shape, generator=settings.generator) < settings.density
        kept.append(Matrix(whole=dense * mask.to(dense.device) / settings.density))
    return weighted_sum(kept, weights)


def truncated(update: Matrix, rank: int) -> tuple[Matrix, float]:
    """Σ_{j ≤ rank} σⱼ uⱼ vⱼᵀ, the nearest product of that rank, and its error ‖ΔW - it‖_F / ‖ΔW‖_F.

    Carl Eckart, Gale Young, "The approximation of one matrix by another of lower rank", 1936,
    https://doi.org/10.1007/BF02288367
    """
    U, S, V = update.svd
    root = S[:rank].sqrt()
    nearest = Matrix(factors=(root[:, None] * V[:, :rank].T, U[:, :rank] * root))
    whole = update.norm()
    return nearest, weighted_sum([update, nearest], [1.0, -1.0]).norm() / whole if whole else 0.0


Method = Callable[[Sequence[Matrix], Sequence[float], Settings], Matrix]
METHODS: dict[str, Method] = {"sum": task_arithmetic, "svd": task_arithmetic, "ties": ties, "dare": dare}
"""By name; after all but `sum`, what comes out is cut to a rank by `truncated`."""
DENSITIES = {"ties": 0.2, "dare": 0.5}
"""The density that a method has if none is given; that of TIES is the paper's."""


def _largest(values: Tensor, density: float) -> Tensor:
    """The values, one at least, whose magnitude is among the largest, the others zero."""
    flat, count = values.flatten(), max(1, int(density * values.numel()))
    kept = torch.zeros_like(flat)
    places = flat.abs().topk(count).indices
    kept[places] = flat[places]
    return kept.view_as(values)
