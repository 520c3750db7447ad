"""EVA: One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation.

Fabian Paischer, Lukas Hauzenberger, Thomas Schmied, Benedikt Alkin, Marc Peter Deisenroth, Sepp Hochreiter, 2024,
https://arxiv.org/abs/2410.07170
"""

import logging
from collections.abc import Iterable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peftlight.delta import Base, Delta
from peftlight.errors import UserError, listed
from peftlight.strategies.lora_layers import LinearLoRA, plain_lora


class EvaLoRA(LinearLoRA):
    """`LinearLoRA` whose A starts as the directions in which the layer's inputs vary most, and whose rank follows.

    A = V_r, the first r right singular vectors of the centred inputs (tokens, in); B = 0.
    """

    settled = False
    """Whether A has been set from data, or loaded."""

    def forward(self, base: Base, x: Tensor) -> Tensor:
        if self.training and not self.settled:
            raise UserError(
                "LoRA's init_lora_weights is eva, which starts from data that it has not seen. A Trainer's fit shows "
                "it; in a loop of your own, call strategy.prepare(adapter, material) first."
            )
        return super().forward(base, x)

    def start_at(self, directions: Tensor) -> None:
        """Set A to the directions (rank, in) and B to zero, with as many columns."""
        self._resize(len(directions))
        with torch.no_grad():
            self.A.copy_(directions)
            self.B.zero_()
        self.settled = True

    def take_shapes(self, state: Mapping[str, Tensor]) -> None:
        if "A" in state:
            self._resize(len(state["A"]))
            self.settled = True

    def finished(self) -> Delta:
        return plain_lora(self.A, self.B, self.scale, getattr(self.dropout, "p", 0.0))

    def _resize(self, rank: int) -> None:
        if rank != len(self.A):
            self.A = nn.Parameter(self.A.new_zeros(rank, self.A.shape[1]))
            self.B = nn.Parameter(self.B.new_zeros(self.B.shape[0], rank))


class Directions:
    """The first principal components of rows that come in batches (incremental SVD, Ross et al. 2008, section 3)."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept = torch.empty(0)  # more than are asked for: what is dropped after a batch is lost to the next
        self.similarity = torch.empty(0)
        """Of each component the cosine to the one that was in its place a batch ago."""
        self._singular = torch.empty(0)
        self._mean = torch.empty(0)
        self._squares = 0.0  # of all distances to the mean
        self._count = 0

    @property
    def components(self) -> Tensor:
        """(components, in), orthonormal, the largest share of the variance first."""
        return self._kept[: self.most]

    @property
    def shares(self) -> Tensor:
        """The share of the variance that each component explains."""
        return self._singular[: self.most].square() / self._squares

    def add(self, rows: Tensor) -> None:
        """Take a batch of rows (tokens, in) in."""
        rows, before = rows.float(), self._count
        mean = rows.mean(0)
        stack = rows - mean
        self._squares += float(stack.square().sum())
        if before:
            drift = (before * len(rows) / (before + len(rows))) ** 0.5 * (self._mean - mean)
            self._squares += float(drift.square().sum())
            stack = torch.cat([self._singular.unsqueeze(1) * self._kept, stack, drift.unsqueeze(0)])
            mean = (before * self._mean + len(rows) * mean) / (before + len(rows))
        self._mean, self._count = mean, before + len(rows)
        # The decomposition may be a rough one: each batch refines it.
        old = self.components
        _, self._singular, columns = torch.svd_lowrank(stack, min(2 * self.most, *stack.shape))
        self._kept = columns.T
        self.similarity = torch.zeros(len(self.components), device=rows.device)
        both = min(len(old), len(self.components))
        self.similarity[:both] = F.cosine_similarity(old[:both], self.components[:both]).abs() if both else 0.0


def settle(
    model: nn.Module,
    ranks: Mapping[str, int],
    limits: Mapping[str, int],
    batches: Iterable[Mapping[str, Tensor]],
    tau: float,
) -> dict[str, Tensor]:
    """The directions (rank, in) that each layer's A starts at, with the ranks redistributed.

    Batches are taken until each direction in use has a cosine of at least `tau` to the one a batch before.

    Args:
        model: run in eval mode.
        ranks: of the layers by path; their sum is what is distributed.
        limits: the largest rank of each.
        batches: the model's inputs.
        tau: the cosine.

    Raises:
        UserError: there are too few tokens, a layer is not used, or its inputs are not finite.
    """
    found: dict[str, Directions] = {}
    counts: dict[str, int] = {}
    seen = 0
    for seen, inputs in enumerate(batches, 1):  # noqa: B007
        _look(model, found, limits, inputs)
        counts = redistributed({site: found[site].shares[: limits[site]] for site in ranks if site in found}, ranks)
        if all(_steady(found[site], count, tau) for site, count in counts.items()):
            break
    unused = [site for site in ranks if site not in found]
    if unused:
        raise UserError(f"EVA saw no input of {listed(unused)} in {seen} batches; leave them out (exclude_modules).")
    if sum(counts.values()) < sum(ranks.values()):
        raise UserError(f"EVA needs more tokens than the {seen} batches hold: at least the largest rank.")
    unsteady = [site for site, count in counts.items() if not _steady(found[site], count, tau)]
    if unsteady:
        logging.getLogger("peftlight").warning(
            "EVA used all %d batches, and the directions of %d of %d layers still moved (eva_tau %s): %s",
            seen, len(unsteady), len(counts), tau, listed(unsteady, 3),
        )  # fmt: skip
    return {site: found[site].components[:count] for site, count in counts.items()}


def redistributed(shares: Mapping[str, Tensor], ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks of the same sum, given to the components that explain the largest shares of their layer's variance.

    Each layer keeps a rank of at least 1, where HF PEFT takes the LoRA away from a layer that gets none.
    """
    order = sorted(((float(share), site) for site in shares for share in shares[site][1:]), key=lambda pair: -pair[0])
    counts = dict.fromkeys(shares, 1)
    for _, site in order[: sum(ranks[site] for site in shares) - len(shares)]:
        counts[site] += 1
    return counts


def _steady(directions: Directions, count: int, tau: float) -> bool:
    return bool((directions.similarity[:count] >= tau).all())


@torch.no_grad()
def _look(
    model: nn.Module, found: dict[str, Directions], limits: Mapping[str, int], inputs: Mapping[str, Tensor]
) -> None:
    """Run the model on one batch, and take the inputs of the layers in."""
    two = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    watcher, training = _Watcher(found, max(limits.values()), inputs.get("attention_mask"), two), model.training
    handles = [model.get_submodule(s).register_forward_pre_hook(partial(watcher, s)) for s in limits]
    model.eval()
    try:
        model(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


class _Watcher:
    """Layers that are called with the same input one after the other, as queries and keys are, share the work."""

    def __init__(self, found: dict[str, Directions], most: int, mask: Tensor | None, has_encoder: bool) -> None:
        self.found, self.most, self.mask, self.has_encoder = found, most, mask, has_encoder
        self.last: tuple[Tensor, Directions] | None = None

    def __call__(self, site: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if self.last is not None and self.last[0] is x:
            self.found.setdefault(site, self.last[1])
            return
        directions, rows = self.found.setdefault(site, Directions(self.most)), self._rows(x, site)
        if not rows.isfinite().all():
            raise UserError(
                f"EVA starts from the inputs of layers, and those of {site} are not finite (NaN or infinite): the "
                "base's file is damaged, or --model.dtype is too small for it."
            )
        directions.add(rows)
        self.last = (x, directions)

    def _rows(self, x: Tensor, site: str) -> Tensor:
        """The tokens that are no padding, as (tokens, in); the mask is that of the source, where there is a decoder."""
        of_source = self.mask is not None and not (self.has_encoder and "decoder" in site.split("."))
        if self.mask is not None and of_source and x.dim() == 3 and self.mask.shape == x.shape[:2]:
            return x[self.mask.bool()]
        return x.flatten(0, -2)
