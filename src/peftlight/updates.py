"""What an adapter changes in its base, as matrices."""

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn

from peftlight.delta import CHILD
from peftlight.errors import UserError
from peftlight.fold_check import check_fold, is_of_user
from peftlight.linear import is_conv1d
from peftlight.matrices import Matrix
from peftlight.paths import first_names
from peftlight.strategy import Adapter


class Updates(Mapping[str, Matrix]):
    """By the name of each tensor of the base that an adapter changes: how much, as ΔW (out, in), computed when asked.

    A delta that adds a product of low rank gives its factors, so that no matrix as large as the weight arises. For one
    that does not it is what folding the delta into the weight changes; for what is trained in place, its value now
    less the one before; a head that is new, or of another size than the base's, counts from zero. A vector's is
    (out, 1), and all dimensions of a tensor after the first count as one. Other adapters that train the base in place
    must be off.
    """

    def __init__(self, adapter: Adapter, new: Collection[str] = ()) -> None:
        """
        Args:
            adapter: on or off.
            new: names of tensors whose values in the base mean nothing.

        Raises:
            UserError: the adapter trains the base in place, and the values before are not kept; or a delta of the
                user's does not compute what it says by `fold`.
        """
        self.adapter = adapter.finished()
        model, self._first = adapter.model, first_names(adapter.model)
        self._tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
        self._tensors |= dict(model.named_buffers(remove_duplicate=False))
        own = {key: value for key, value in adapter.state().items() if CHILD not in key.split(".")}
        if own.keys() - adapter.originals.keys():
            raise UserError(
                f"{type(adapter.strategy).__name__} has trained the base itself and kept no copy of it: load the "
                "adapter with keep_base=True."
            )
        self.trained = {key: value for key, value in own.items() if value.is_floating_point()}
        """The values of what is trained in place."""
        self.new = {key for key, value in self.trained.items() if key in new or value.shape != self._had(key).shape}
        """Of these, what counts from zero."""
        self.refused: dict[str, str] = {}
        """Modules whose delta is no change of a weight, and why: prompts, prefixes, bottlenecks."""
        self.of_deltas = {name: site for site in self.adapter.sites for name in self._changed_at(site)}
        """What deltas change, and the modules that these are on."""

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self.of_deltas, *self.trained])

    def __contains__(self, name: object) -> bool:
        return name in self.of_deltas or name in self.trained

    def __len__(self) -> int:
        return len(self.of_deltas.keys() | self.trained.keys())

    @torch.no_grad()
    def __getitem__(self, name: str) -> Matrix:
        if name not in self.of_deltas:
            return Matrix.of_tensor(self._laid_out(name, self.trained[name].double() - self.before(name)))
        site = self.of_deltas[name]
        factors = self.adapter.sites[site].factors()
        if factors is not None and name not in self.trained:
            return Matrix.of_factors(factors)
        after = self._folded(site)[name]
        return Matrix.of_tensor(after - self._laid_out(name, self.before(name)))

    def before(self, name: str) -> Tensor:
        """The tensor as it is in the base alone, in float64.

        Raises:
            UserError: it is quantized.
        """
        value = self._had(name)
        if name in self.new:
            return torch.zeros_like(self.trained[name], dtype=torch.float64)
        if not value.is_floating_point():
            raise UserError(f"{name} is quantized ({value.dtype}), so that it cannot be read as numbers.")
        return value.double()

    def after(self, name: str, change: Matrix) -> Tensor:
        """The tensor, laid out as the base stores it, with this change instead of the adapter's own."""
        before = self._laid_out(name, self.before(name))
        kind = self.trained.get(name, self._tensors[name]).dtype
        return self._laid_out(name, before + change.dense().view(before.shape)).to(kind).contiguous()

    def _had(self, name: str) -> Tensor:
        """The base's own value; while the adapter is off, the model holds it."""
        adapter, tensor = self.adapter, self._tensors[name]
        held = {**adapter.merged, **adapter.originals} if adapter.enabled else {}
        return held.get(self._first[id(tensor)], tensor).detach()

    def _changed_at(self, site: str) -> list[str]:
        """The tensors of a module that its delta changes; where there are none, the reason is noted."""
        module = self.adapter.model.get_submodule(site)
        if not isinstance(getattr(module, "weight", None), nn.Parameter):
            kinds = f"{type(self.adapter.sites[site]).__name__} on {type(module).__name__}"
            self.refused[site] = f"{kinds}: there is no weight that it changes."
            return []
        delta = self.adapter.sites[site]
        if is_of_user(delta):
            check_fold(delta, module, *self._found_at(site))
        if delta.factors() is not None:
            return [_joined(site, "weight")]
        try:
            return list(self._folded(site))
        except UserError as error:
            self.refused[site] = str(error)
            return []

    @torch.no_grad()
    def _folded(self, site: str) -> dict[str, Tensor]:
        """Weight and bias as the delta changes them; the bias only if it does."""
        weight, bias = _joined(site, "weight"), _joined(site, "bias")
        found, had = self._found_at(site)
        changed, then = self.adapter.sites[site].fold(found, had)
        return {weight: changed} if then is None or then is had else {weight: changed, bias: then}

    def _found_at(self, site: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a module, as its delta finds them and as `Delta.fold` takes them."""
        weight, bias = _joined(site, "weight"), _joined(site, "bias")
        return self._laid_out(weight, self._now(weight)), self._now(bias) if bias in self._tensors else None

    def _now(self, name: str) -> Tensor:
        """The tensor as the adapter's delta finds it."""
        trained = self.trained.get(self._first[id(self._tensors[name])])
        return self.before(name) if trained is None else trained.double()

    def _laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """A weight as (out, in), which GPT-2's linear layers store the other way round."""
        module, _, leaf = name.rpartition(".")
        return tensor.T if leaf == "weight" and is_conv1d(self.adapter.model.get_submodule(module)) else tensor


def _joined(site: str, leaf: str) -> str:
    return f"{site}.{leaf}".lstrip(".")
