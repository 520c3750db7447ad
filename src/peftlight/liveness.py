"""The audit of a training: what had a gradient, what moved, and whether the frozen base stayed as it was."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftlight.errors import UserError, listed
from peftlight.reach import unreached
from peftlight.shards import first_position, local, summed_over_shards
from peftlight.strategy import Adapter
from peftlight.unreached import may_stay, stays_as_it_is, what_to_do

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PART = 1 << 18
_MOST = 1 << 16
"""Of a larger tensor as many entries are looked at, evenly spaced; their first values are kept during the training."""


@dataclass(frozen=True)
class Trained:
    """One trained tensor after a training."""

    name: str
    had_gradient: bool
    moved: bool
    moved_entries: int = 0
    """How many of its entries, of those that were looked at, have another value than at the start."""
    entries: int = 0
    """How many were looked at: all, or 65,536 evenly spaced ones of a larger tensor (in each process its part)."""


@dataclass(frozen=True)
class Verdict:
    """What became of every trained tensor, and the base's checksum."""

    trained: list[Trained]
    base_checksum: str

    @property
    def still(self) -> list[str]:
        """Names of the trained tensors that are where they started."""
        return [tensor.name for tensor in self.trained if not tensor.moved]

    @property
    def hardly_moved(self) -> list[Trained]:
        """Those that moved, but in less than half of their entries; those that moved least come first."""
        few = [each for each in self.trained if each.moved and 2 * each.moved_entries < each.entries]
        return sorted(few, key=lambda each: each.moved_entries / each.entries)

    def __str__(self) -> str:
        moved = f"{len(self.trained) - len(self.still)} of {len(self.trained)} trained tensors moved"
        found, looked = sum(each.moved_entries for each in self.trained), sum(each.entries for each in self.trained)
        entries = f"; of {looked:,} entries {found:,} moved"
        left = f"; where they started: {listed(self.still)}" if self.still else ""
        few = [f"{each.name} ({each.moved_entries:,} of {each.entries:,})" for each in self.hardly_moved]
        hardly = f"; most entries are where they started in: {listed(few, 6)}" if few else ""
        return f"audit: {moved}, the frozen base is unchanged ({self.base_checksum}){entries}{left}{hardly}"


class Liveness:
    """Watches one training of an adapter."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._base = _checksums(self._frozen())
        self._start = _checksums(adapter.parameters().items())
        self._first_values = {name: _sample(tensor).cpu() for name, tensor in adapter.parameters().items()}
        self._had_gradient: set[str] = set()
        self._looked = self._had_step = False

    def look_again(self) -> None:
        """Something else requires a gradient since the last step: what of it was frozen until now is trained."""
        new = {name: value for name, value in self.adapter.state().items() if name in self._base}
        for name in new:
            del self._base[name]
        trained = self.adapter.parameters()
        new = {name: value for name, value in new.items() if name in trained}
        self._start |= _checksums(new.items())
        self._first_values |= {name: _sample(value).cpu() for name, value in new.items()}

    def before_backward(
        self, loss: Tensor, sum_over_processes: Callable[[Tensor], Tensor], processes: int, waits: bool
    ) -> None:
        """Look at what the first loss depends on: several processes would wait for each other's gradients for ever.

        With `waits` they also do so for a gradient that is nowhere, as under DDP.

        Raises:
            UserError: a trained tensor would have no gradient in some process.
        """
        if self._looked:
            return
        self._looked = True
        names = [name for name, parameter in self.adapter.parameters().items() if parameter.requires_grad]
        without = set(unreached(loss, self.adapter.model, self.adapter.parameters()))
        counts = sum_over_processes(torch.tensor([name in without for name in names], device=loss.device).float())
        somewhere = [name for name, count in zip(names, counts.tolist(), strict=True) if 0 < count < processes]
        nowhere = [name for name, count in zip(names, counts.tolist(), strict=True) if count == processes]
        staying = self._refuse_dead(nowhere)
        if staying and waits:
            raise UserError(
                f"{len(staying)} of {len(names)} trained tensors have no gradient, for the loss does not depend on "
                f"them: {listed(staying)}. The processes would wait for them for ever. Set "
                "--trainer.strategy ddp_find_unused_parameters_true; they then stay as they are."
            )
        if somewhere:
            raise UserError(
                f"{len(somewhere)} of {len(names)} trained tensors have no gradient in some of the {processes} "
                f"processes, where the loss of the first batch does not depend on them: {listed(somewhere)}. Set "
                "--trainer.strategy ddp_find_unused_parameters_true"
            )

    def after_backward(self) -> None:
        """Look at the gradients before the first optimizer step, and later for those that had none in it.

        Raises:
            UserError: a trained tensor has none in the first step, though it was asked for by name.
        """
        if not (waiting := self._start.keys() - self._had_gradient):
            return
        own = self.adapter.parameters()
        self._had_gradient |= {name for name in waiting if name in own and own[name].grad is not None}
        if not self._had_step:  # what is unfrozen later may be more than the loss depends on; the verdict names it
            dead = sorted(name for name in waiting - self._had_gradient if own[name].requires_grad)
            if staying := self._refuse_dead(dead):
                logging.getLogger("peftlight").warning(stays_as_it_is(staying, len(self._start)))
        self._had_step = True

    def _refuse_dead(self, dead: Sequence[str]) -> list[str]:
        """Those of the dead that may stay as they are."""
        staying = may_stay(self.adapter, dead)
        if asked_for := [name for name in dead if name not in staying]:
            raise UserError(
                f"{len(asked_for)} of {len(self._start)} trained tensors had no gradient in the first step: "
                f"{listed(asked_for)}. The loss does not depend on them, so they would never train. "
                f"{what_to_do(self.adapter, asked_for)}"
            )
        return sorted(staying)

    def verdict(self) -> Verdict:
        """What the training did.

        Raises:
            UserError: a frozen tensor of the base has changed.
        """
        base = _checksums(self._frozen())
        changed = sorted(name for name, value in self._base.items() if base.get(name) != value)
        if changed:
            raise UserError(
                f"The frozen base changed while it was trained: {listed(changed)}. An adapter holds what trains alone, "
                "and on the base as it was it would compute something else."
            )
        now, moved = _checksums(self.adapter.parameters().items()), self._moved_entries()
        trained = [
            Trained(name, name in self._had_gradient, now.get(name) != old, *moved.get(name, (0, 0)))
            for name, old in self._start.items()
        ]
        return Verdict(trained, hashlib.sha256(repr(sorted(base.items())).encode()).hexdigest()[:16])

    def _moved_entries(self) -> dict[str, tuple[int, int]]:
        """Of each trained tensor: how many of the entries looked at have moved, and how many those are."""
        own = {name: tensor for name, tensor in self.adapter.parameters().items() if name in self._first_values}
        if not own:
            return {}
        device = next(iter(own.values())).device
        counts = torch.zeros(2, len(own), dtype=torch.int64, device=device)
        for number, (name, tensor) in enumerate(own.items()):
            now, first = _sample(tensor), self._first_values[name].to(tensor.device)
            counts[0, number] = (now != first).sum() if now.shape == first.shape else len(now)
            counts[1, number] = len(now)
        moved, looked = (summed_over_shards(each, own.values()).tolist() for each in counts)
        return dict(zip(own, zip(moved, looked, strict=True), strict=True))

    def _frozen(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and the saved buffers that are not the adapter's."""
        model, own = self.adapter.model, self.adapter.state()
        saved = model.state_dict()
        for named in (model.named_parameters(), model.named_buffers()):
            for name, tensor in named:
                if name in saved and name not in own and not tensor.requires_grad:
                    yield name, tensor


def state_checksum(adapter: Adapter) -> str:
    """Of all that the adapter keeps; two states that differ in one value differ in it. Sharded, all processes ask."""
    return hashlib.sha256(repr(sorted(_checksums(adapter.state().items()).items())).encode()).hexdigest()[:16]


def _sample(tensor: Tensor) -> Tensor:
    """A copy of the entries of a tensor that are looked at; of one that is sharded, of the part here."""
    flat = local(tensor.detach()).reshape(-1)
    if len(flat) > _MOST:
        return flat[torch.arange(_MOST, device=flat.device) * len(flat) // _MOST]
    return flat.clone()


def _checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Of each tensor one number from its bits, the same in every process; two that differ in one value differ in it."""
    named = {name: tensor.detach() for name, tensor in tensors}
    if not named:
        return {}
    # Written into one tensor: a small one from each sum, kept among its large ones, would hold the memory of them all.
    totals = torch.zeros(len(named), dtype=torch.int64, device=next(iter(named.values())).device)
    for number, tensor in enumerate(named.values()):
        totals[number] = _sum_of_bits(tensor)
    return dict(zip(named, summed_over_shards(totals, named.values()).tolist(), strict=True))


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Σ w (2 p + 1) modulo 2^64 over the positions p, where w are the value's bits as an integer.

    An odd factor has an inverse modulo 2^64, so no change of a single value leaves the sum as it was. Of a tensor that
    is sharded it is the sum over the part here: the sums of all parts add up to that of the whole.
    """
    part, first = local(tensor), first_position(tensor)
    words = part.contiguous().view(-1).view(_INTEGERS[part.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=part.device)
    odd = 2 * torch.arange(min(len(words), _PART), device=part.device) + 1
    for start in range(0, len(words), _PART):
        bits = words[start : start + _PART]
        total += (bits * odd[: len(bits)]).sum() + 2 * (first + start) * bits.sum()
    return total
