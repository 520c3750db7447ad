"""LoRA: Low-Rank Adaptation of Large Language Models.

Edward J. Hu, Yelong Shen, Phillip Wallis, Zeyuan Allen-Zhu, Yuanzhi Li, Shean Wang, Lu Wang, Weizhu Chen, 2021,
https://arxiv.org/abs/2106.09685

rsLoRA (`use_rslora`): A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA.
Damjan Kalajdzievski, 2023, https://arxiv.org/abs/2312.03732

LoRA+ (`lora_plus_ratio`): Efficient Low Rank Adaptation of Large Models.
Soufiane Hayou, Nikhil Ghosh, Bin Yu, 2024, https://arxiv.org/abs/2402.12354

DoRA is in `lora_dora`, PiSSA and OLoRA are in `lora_start`, EVA is in `lora_eva`.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import nn

from peftlight.candidates import PRESETS
from peftlight.delta import Delta, Factors
from peftlight.errors import UserError, listed, nearest
from peftlight.linear import is_linear
from peftlight.paths import own_parameters
from peftlight.strategies.lora_dora import ConvDoRA, EmbeddingDoRA, LinearDoRA
from peftlight.strategies.lora_eva import EvaLoRA, settle
from peftlight.strategies.lora_layers import ConvLoRA, EmbeddingLoRA, LinearLoRA, largest_rank, matrix_shapes
from peftlight.strategies.lora_start import DifferenceLoRA, start_from
from peftlight.strategy import Adapter, Material, PEFTStrategy
from peftlight.targets import check_patterns, chosen, matching, pattern_value

Start = Literal["default", "gaussian", "pissa", "olora", "eva"]
FROM_WEIGHT = ("pissa", "olora")
"""The starts that are parts of the weight."""
_OF_LINEAR = (*FROM_WEIGHT, "eva")
"""The starts that only linear layers have."""


@dataclass
class LoRA(PEFTStrategy):
    """Add a trained product of two low-rank matrices to chosen layers; the layers themselves stay frozen."""

    rank: int = 8
    """Rank r of the update."""
    alpha: float = 16
    """Numerator of the scale alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of the update."""
    target_modules: str | list[str] | None = None
    """Names of layers, a preset (attention, attention+mlp, all-linear) or a regex; none: the architecture's default."""
    exclude_modules: list[str] | None = None
    """Names of layers to leave alone."""
    layers: str | list[int] | None = None
    """Which blocks of the stack: "last 4", "first 2", "0-3", or a list of numbers; none: all."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Another rank for the modules whose name ends with a pattern."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Another alpha for the modules whose name ends with a pattern."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases of the base are trained too: none, all, or those of the adapted layers."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules of the base that are trained whole and saved with the adapter."""
    use_rslora: bool = False
    """Scale by alpha / √rank instead, so that a large rank learns as fast as a small one (rsLoRA)."""
    use_dora: bool = False
    """Train the norm of each row of the changed weight apart from its direction (DoRA)."""
    init_lora_weights: Start = "default"
    """Where A and B start: default, gaussian, pissa or olora (parts of the weight), eva (from the training data)."""
    pissa_niter: int | None = None
    """Iterations of a faster, randomised decomposition for pissa; none: the exact one."""
    eva_rho: float = 2.0
    """With eva, ranks move between layers, up to this multiple of a layer's own; 1: they stay."""
    eva_tau: float = 0.99
    """With eva, batches are looked at until the directions found have this cosine to those of a batch before."""
    lora_plus_ratio: float | None = None
    """Factor on the learning rate of B, 16 for example (LoRA+); none: B learns as A does."""

    refuses_wasted_rank = True
    """Whether a rank above what a layer can use is an error. An adapter that was saved is read all the same."""

    def __post_init__(self) -> None:
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise UserError(f"LoRA needs a rank of at least 1; {where} is {rank}.")
        for where, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if alpha <= 0:
                raise UserError(f"LoRA's {where} is a number above 0, or the update would be nothing; got {alpha}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"LoRA's dropout is a share from 0 up to, not including, 1; got {self.dropout}.")
        self._check_options()

    def _check_options(self) -> None:
        start, starts = self.init_lora_weights, get_args(Start)
        if start not in starts:
            raise UserError(
                f"LoRA's init_lora_weights is {start!r}.{nearest(str(start), starts)} Expected {listed(starts)}."
            )
        if self.use_dora and start not in ("default", "gaussian"):
            raise UserError(
                f"LoRA's use_dora takes init_lora_weights default or gaussian, not {start}: the norms that it trains "
                "are those of the whole weight. Leave one of the two out."
            )
        if self.pissa_niter is not None and (start != "pissa" or self.pissa_niter < 1):
            raise UserError(
                f"LoRA's pissa_niter is a number from 1 up, and for init_lora_weights pissa; got {self.pissa_niter} "
                f"with {start}."
            )
        if self.eva_rho < 1 or not 0 < self.eva_tau <= 1:
            raise UserError(
                f"LoRA's eva_rho is at least 1 and eva_tau a cosine above 0 and up to 1; got {self.eva_rho} and "
                f"{self.eva_tau}."
            )
        if self.lora_plus_ratio is not None and self.lora_plus_ratio <= 0:
            raise UserError(f"LoRA's lora_plus_ratio is a factor above 0; got {self.lora_plus_ratio}.")

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        sites = self._sites(model)
        check_patterns("rank_pattern", self.rank_pattern, sites)
        check_patterns("alpha_pattern", self.alpha_pattern, sites)
        if self.refuses_wasted_rank:
            self._check_ranks(sites)
        for name, module in sites.items():
            yield name, self._delta(name, module)

    def train(self, model: nn.Module) -> Iterable[str]:
        names = matching(model, self.modules_to_save)
        if self.bias == "all":
            names += [name for name, _ in own_parameters(model) if name.rpartition(".")[2] == "bias"]
        if self.bias == "lora_only":
            sites = self._sites(model).items()
            names += [f"{name}.bias" for name, module in sites if getattr(module, "bias", None) is not None]
        return names

    def uses(self, hook: str) -> bool:
        return super().uses(hook) and (hook != "prepare" or self.init_lora_weights == "eva")

    def prepare(self, adapter: Adapter, material: Material) -> None:
        """EVA: set A from the inputs that the layers have on the training rows, and settle the ranks."""
        if self.init_lora_weights != "eva":
            return
        sites = {site: delta for site, delta in adapter.sites.items() if isinstance(delta, EvaLoRA)}
        ranks = {site: self._rank(site) for site in sites}
        limits = {
            site: min(round(self.eva_rho * rank), largest_rank(adapter.model.get_submodule(site)))
            for site, rank in ranks.items()
        }
        starts = settle(adapter.model, ranks, limits, material.batches(), self.eva_tau)
        for site, directions in starts.items():
            sites[site].start_at(directions)
        settled = self._settled(adapter)
        self.rank_pattern, self.alpha_pattern = settled.rank_pattern, settled.alpha_pattern

    def learning_rates(self, adapter: Adapter) -> Mapping[str, float]:
        """LoRA+: B of the linear layers and convolutions, which starts at zero and makes the output, learns faster."""
        if self.lora_plus_ratio is None:
            return {}
        faster = {id(delta.B) for delta in adapter.sites.values() if isinstance(delta, LinearLoRA)}
        return {name: self.lora_plus_ratio for name, p in adapter.parameters().items() if id(p) in faster}

    def finished(self, adapter: Adapter) -> "LoRA":
        """Plain LoRA: of the doubled rank for PiSSA and OLoRA, of the settled ranks for EVA."""
        if self.init_lora_weights == "eva":
            return self._settled(adapter)
        if self.init_lora_weights not in FROM_WEIGHT:
            return self
        more = math.sqrt(2) if self.use_rslora else 2
        return replace(
            self,
            init_lora_weights="default",
            pissa_niter=None,
            rank=2 * self.rank,
            alpha=more * self.alpha,
            rank_pattern={pattern: 2 * rank for pattern, rank in self.rank_pattern.items()},
            alpha_pattern={pattern: more * alpha for pattern, alpha in self.alpha_pattern.items()},
        )

    def start_at(self, site: str, module: nn.Module) -> Factors:
        """Where A and B of a linear layer start with pissa or olora.

        Raises:
            UserError: its weight has no such parts.
        """
        how = self.init_lora_weights
        try:
            return start_from(module, self._rank(site), self._scale(site), how, self.pissa_niter)
        except torch.linalg.LinAlgError as error:
            raise UserError(f"LoRA cannot start by {how} from the weight of {site}: {error}") from error

    def _settled(self, adapter: Adapter) -> "LoRA":
        """The recipe with the ranks that EVA chose, and with alphas that leave each layer's scale as it was."""
        ranks: dict[str, int] = {}
        alphas: dict[str, float] = {}
        for site, delta in adapter.sites.items():
            rank, own = len(delta.get_parameter("A")), self._rank(site)
            alpha = self._alpha(site)
            if rank != own:
                alpha *= math.sqrt(rank / own) if self.use_rslora else rank / own
            if rank != self.rank:
                ranks[f"^{re.escape(site)}"] = rank
            if alpha != self.alpha:
                alphas[f"^{re.escape(site)}"] = alpha
        return replace(self, rank_pattern=ranks, alpha_pattern=alphas)

    def _rank(self, site: str) -> int:
        return pattern_value(self.rank_pattern, site, self.rank)

    def _alpha(self, site: str) -> float:
        return pattern_value(self.alpha_pattern, site, self.alpha)

    def _scale(self, site: str) -> float:
        rank = self._rank(site)
        return self._alpha(site) / (math.sqrt(rank) if self.use_rslora else rank)

    def _delta(self, name: str, module: nn.Module) -> Delta:
        rank, gaussian = self._rank(name), self.init_lora_weights == "gaussian"
        scale = self._scale(name)
        if self.init_lora_weights in _OF_LINEAR and not is_linear(module):
            raise UserError(
                f"LoRA's init_lora_weights {self.init_lora_weights} is for linear layers; {name} is a "
                f"{type(module).__name__}. Leave it out (exclude_modules), or choose default or gaussian."
            )
        if isinstance(module, nn.Embedding):
            sizes = (rank, module.num_embeddings, module.embedding_dim, scale)
            return EmbeddingDoRA(*sizes, module) if self.use_dora else EmbeddingLoRA(*sizes)
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            self._check_groups(name, module, rank)
        shapes = matrix_shapes(module, rank)
        if self.init_lora_weights == "eva":
            return EvaLoRA(*shapes, scale, self.dropout)
        if self.init_lora_weights in FROM_WEIGHT:
            return DifferenceLoRA(*shapes, scale, self.dropout, self.start_at(name, module))
        if self.use_dora:
            kind = LinearDoRA if is_linear(module) else ConvDoRA
            return kind(*shapes, scale, self.dropout, gaussian, module)
        return (LinearLoRA if is_linear(module) else ConvLoRA)(*shapes, scale, self.dropout, gaussian)

    def _check_groups(self, name: str, module: nn.Conv1d | nn.Conv2d, rank: int) -> None:
        if rank % module.groups:
            raise UserError(f"{name} is a convolution of {module.groups} groups: its rank {rank} must be a multiple.")
        if self.use_dora and module.groups > 1:
            raise UserError(
                f"LoRA's use_dora cannot serve {name}, a convolution of {module.groups} groups: the changed weight, "
                "whose norms it trains, does not exist there. Leave it out (exclude_modules)."
            )

    def _check_ranks(self, sites: Mapping[str, nn.Module]) -> None:
        limits = {name: largest_rank(module) for name, module in sites.items()}
        wasted = [name for name, limit in limits.items() if self._rank(name) > limit]
        if wasted:
            each = (f"{name} (rank {self._rank(name)}, at most {limits[name]})" for name in wasted)
            fitting: dict[str, int] = {}
            for name in wasted:
                leaf = name.rpartition(".")[2]
                fitting[leaf] = min(limits[name], fitting.get(leaf, limits[name]))
            pattern = ", ".join(f"{leaf}: {limit}" for leaf, limit in fitting.items())
            raise UserError(
                f"LoRA's rank is above the smaller side of {listed(each, 3)}; more of it changes nothing. Set rank to "
                f"{min(limits.values())} or below, or rank_pattern: {{{pattern}}}, or leave the "
                "layers out (exclude_modules)."
            )

    def _sites(self, model: nn.Module) -> dict[str, nn.Module]:
        whole = matching(model, self.modules_to_save)
        by_preset = self.target_modules is None or self.target_modules in PRESETS
        start = self.init_lora_weights
        linear = by_preset and start in _OF_LINEAR  # what is chosen for the user is what the start can serve
        return chosen(
            model, self.target_modules, (nn.Linear,) if linear else _KINDS, exclude_modules=self.exclude_modules,
            layers=self.layers, skip=whole, method=f"LoRA with init_lora_weights {start}" if linear else "LoRA",
        )  # fmt: skip


_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
