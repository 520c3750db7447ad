"""A training that goes on: held to what its checkpoint records, with the allowed changes put into effect."""

import warnings
from collections.abc import Sequence
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from peftlight.console import say
from peftlight.errors import UserError, listed
from peftlight.interop.base_hash import Fingerprint, differs, fingerprint
from peftlight.resume.abandoned import set_aside
from peftlight.resume.changes import OF_PROCESSES, Change
from peftlight.resume.past import Past
from peftlight.resume.recorded import code_of, versions
from peftlight.tasks import PEFTModule


class Continuation(Callback):
    """Refuses other data, another base or other code than the checkpoint's, and carries allowed changes through."""

    def __init__(
        self, past: Past, changes: Sequence[Change], allowed: Sequence[str], config: str, before: Sequence[str] = ()
    ) -> None:
        """
        Args:
            past: what is gone on with.
            changes: the allowed ones of the configuration.
            allowed: all names that the user allowed.
            config: the resolved configuration as YAML.
            before: what earlier resumes allowed.
        """
        self.past, self.changes, self.allowed, self.config = past, changes, {*allowed, *before}, config
        self._asked = set(allowed)
        self._groups: list[dict[str, Any]] = []
        self._sizes: list[int] = []
        self._options = {option for change in changes for option in _of_optimizer(change)}
        self._anew = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, PEFTModule)
        pl_module.goes_on = True
        more = {"processes"} if any(change.key.startswith(OF_PROCESSES) for change in self.changes) else set()
        pl_module.allow_changes = self.allowed | more | {change.key for change in self.changes}
        facts, precision = self.past.facts, str(trainer.precision)
        asked = any(change.key == "trainer.precision" for change in self.changes)
        was, now = facts.get("code", {}), code_of(yaml.safe_load(self.config))
        self._hold(
            ("trainer.precision", precision if asked else facts.get("precision", precision), precision),
            ("data", facts.get("data_fingerprint"), getattr(trainer.datamodule, "fingerprint", None)),  # type: ignore[attr-defined]
            ("code", "", listed(name for name in was if now.get(name, was[name]) != was[name])),
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PEFTModule)
        assert pl_module.adapter is not None
        was, now = self.past.facts.get("base"), fingerprint(pl_module.adapter)
        self._hold(("base", "", differs(Fingerprint(**was), now) or "" if was else ""))
        was_versions, here = self.past.facts.get("versions", {}), versions()
        other = [f"{name} {was_versions[name]} -> {here.get(name)}" for name in was_versions
                 if was_versions[name] != here.get(name)]  # fmt: skip
        if other:
            rank_zero_warn(f"Since the checkpoint these have changed, so numbers may differ: {listed(other)}.")
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        if self._sizes and self._sizes != [len(group["params"]) for group in groups]:
            told = listed(self.changes) or "the code is another"
            raise UserError("The optimizer has other groups of parameters here than in the run, so that its state does "
                            f"not fit them: {told}. Leave the change out, or begin a new run.")  # fmt: skip
        # What the checkpoint will write over.
        self._groups = [{key: value for key, value in group.items() if key != "params"} for group in groups]

    def _hold(self, *facts: tuple[str, str | None, str | None]) -> None:
        """Refuse the facts (name, recorded, here) that are not the recorded ones, unless they are allowed."""
        known = [(name, was, now) for name, was, now in facts if was is not None and now is not None]
        differing = {name: _DIFFERENT[name].format(was=was, now=now) for name, was, now in known if was != now}
        if refused := {name: text for name, text in differing.items() if name not in self.allowed}:
            raise UserError(
                "\n  ".join([*refused.values(), f"To go on nevertheless: --allow_changes {' '.join(refused)}"])
            )
        for name in sorted({name for name, _, _ in known} & self._asked - set(differing)):
            if not any(f"{change.key}.".startswith(f"{name}.") for change in self.changes):
                raise UserError(f"--allow_changes {name} is not needed: it is as it was in the run. Leave it out.")

    # ---- what was allowed

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Leave out what would write over the changes."""
        keys = [change.key for change in self.changes]
        if "optimizer" in keys:
            assert isinstance(pl_module, PEFTModule)
            checkpoint["optimizer_states"], pl_module.saved_groups = [], None
        self._sizes = [
            len(group["params"]) for state in checkpoint["optimizer_states"] for group in state["param_groups"]
        ]
        follows_loss = any("num_bad_epochs" in state for state in checkpoint.get("lr_schedulers", []))
        # A schedule that is planned has no past: it is that of the new configuration from its first step on.
        named = "lr" in self._options or any(key == "optimizer" or key.startswith("lr_scheduler") for key in keys)
        self._anew = named or bool(keys and not follows_loss)
        if self._anew:
            checkpoint["lr_schedulers"] = []
        for stopping in trainer.early_stopping_callbacks:  # its state in a checkpoint holds one of its options
            if state := checkpoint.get("callbacks", {}).get(stopping.state_key):
                state["patience"] = stopping.patience

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the optimizer its changed options, and the schedule the place it would have come to by this step."""
        assert isinstance(pl_module, PEFTModule)
        if self.changes:
            self._put_into_effect(trainer, pl_module)
        if trainer.is_global_zero:
            set_aside(self.past)

    def _put_into_effect(self, trainer: Trainer, module: PEFTModule) -> None:
        self._check_state(trainer)
        module.follow_steps()
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, fresh in zip(groups, self._groups, strict=True):
            group.update({key: value for key, value in fresh.items() if key in self._options})
            group.update({key: fresh[key] for key in ("lr", "initial_lr") if self._anew and key in fresh})
        for config in trainer.lr_scheduler_configs if self._anew else ():
            if not isinstance(config.scheduler, ReduceLROnPlateau):
                _advance(config.scheduler, trainer.global_step)
        rates = listed(dict.fromkeys(f"{group['lr']:.4g}" for group in groups))
        say(f"allowed changes: {'; '.join(map(str, self.changes))}. The learning rate is now {rates}.")

    def _check_state(self, trainer: Trainer) -> None:
        """Options have the optimizer keep more for each tensor; after a first step it takes that for granted."""
        kept = {name for optimizer in trainer.optimizers for state in optimizer.state.values() for name in state}
        for option, (own, needed) in _NEEDED.items():
            chosen = option in self._options and any(group.get(option) for group in self._groups)
            if chosen and own in kept and needed not in kept:
                raise UserError(f"The optimizer's {option} cannot be switched on in mid-run: {needed}, which it needs "
                                "for that, was not kept from the beginning. Leave the change out, or begin a new run "
                                "with it.")  # fmt: skip


_DIFFERENT = {
    "trainer.precision": "The run trained in precision {was}; here {now} was chosen.",
    "data": "The data are not those that the run trained on: their content has changed (fingerprint {was:.12}, now "
            "{now:.12}).",
    "code": "The code of {now} is not the one that the run trained with.",
    "base": "The base is not the one that the run trained on: they differ in {now}.",
}  # fmt: skip


_NEEDED = {
    "amsgrad": ("exp_avg_sq", "max_exp_avg_sq"),
    "centered": ("square_avg", "grad_avg"),
    "momentum": ("square_avg", "momentum_buffer"),
}
"""By option: what its kind of optimizer (Adam, RMSprop) keeps for each tensor, and what besides with the option."""


def _of_optimizer(change: Change) -> set[str]:
    """The options of the optimizer that it changes; those which no signature has come as one value."""
    name = change.key.removeprefix("optimizer.")
    return {*(change.was or ()), *(change.now or ())} if name == "dict_kwargs" else {name}


def _advance(scheduler: Any, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step\\(\\)` before")  # it makes up for those
        for _ in range(steps):
            scheduler.step()
