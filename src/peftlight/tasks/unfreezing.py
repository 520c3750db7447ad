"""What a callback unfreezes in mid-run: the adapter owns it from then on, and a resume knows it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from peftlight.errors import UserError, listed
from peftlight.linear import is_quantized
from peftlight.shards import is_sharded
from peftlight.tasks.adapted_base import check_precision
from peftlight.tasks.added_groups import follow, reference, share_of_rate
from peftlight.tasks.averaging import average_gradients

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule

_KEY = "unfrozen"


class Unfreezing:
    """Follows what requires a gradient, step by step.

    A checkpoint has under "unfrozen", once it is another than at the start: `owned`, what of the base the adapter got
    to own; `groups`, of each group that the optimizer got the names in it and its share of the first one's rate; and
    `trains`, all that requires a gradient.
    """

    def __init__(self, module: "PEFTModule") -> None:
        self._module = module
        self.copied = False
        """Whether a callback has made a copy of the task, in which what is unfrozen later is missing."""
        self._trains: set[nn.Parameter] = set()
        self._at_start: set[nn.Parameter] = set()
        self._groups_at_start: int | None = None
        self._owned: list[str] = []
        self._past: Mapping[str, Any] = {}
        self._resumed: list[dict[str, Any]] | None = None
        self._groups_seen = 0
        self._unchecked = False

    # ---- what a callback unfroze

    def start(self) -> None:
        """A training begins: what requires a gradient by now is trained from the start."""
        self._groups_at_start = None
        self.look()
        self._at_start = set(self._trains)

    def look(self) -> bool:
        """Have the adapter own what requires a gradient since the last look; returns whether anything else trains.

        Raises:
            UserError: it cannot be trained here.
        """
        adapter = self._module.adapter
        assert adapter is not None
        trains = {parameter for parameter in adapter.model.parameters() if parameter.requires_grad}
        if trains == self._trains:
            return False
        self._unchecked = True
        new, own, self._trains = trains - self._trains, set(adapter.parameters().values()), trains
        if names := [name for name, p in adapter.model.named_parameters() if p in new and p not in own]:
            self._take(names)
            rank_zero_info(f"Unfrozen by step {self._module.trainer.global_step}, and part of the adapter from now on: "
                           f"{listed(names)}.")  # fmt: skip
        return True

    def _take(self, names: Sequence[str]) -> None:
        module, adapter = self._module, self._module.adapter
        assert adapter is not None
        if is_sharded(adapter.model):
            raise UserError(f"{listed(names, 3)} were unfrozen in mid-run, but under fsdp2 what trains is settled when "
                            "the model is sharded. Choose --trainer.strategy ddp.")  # fmt: skip
        if self.copied:
            raise UserError(f"{listed(names, 3)} were unfrozen after a callback had copied the task, to average its "
                            "weights: the average would lack them. Leave one of the two callbacks out.")  # fmt: skip
        if packed := [name for name in names if is_quantized(adapter.model.get_submodule(name.rpartition(".")[0]))]:
            raise UserError(
                f"{listed(packed, 3)} were unfrozen, but their layers are quantized, so that they stay as they are. "
                "Keep the layers out of the quantization (keep), or leave them frozen."
            )
        adapter.train_also(names)
        self._owned += names
        check_precision(module, adapter)

    def check_held(self, optimizer: Optimizer) -> None:
        """See that the optimizer steps with all that requires a gradient, once that is another than before.

        Lightning's helper leaves out of the group that it adds what has the values of another tensor, as biases of
        zeros have: these get a group like that one.

        Raises:
            UserError: the optimizer was given nothing of it.
        """
        if not self._unchecked:
            return
        self._unchecked = False
        groups, named = optimizer.param_groups, self._named()
        held = {parameter for group in groups for parameter in group["params"]}
        lost = [name for name, parameter in named.items() if parameter in self._trains - held]
        seen, self._groups_seen = self._groups_seen, len(groups)
        if lost and len(groups) > seen > 0:
            optimizer.add_param_group({**groups[-1], "params": [named[name] for name in lost]})
        elif lost:
            raise UserError(
                f"{len(lost)} tensors were unfrozen, but the optimizer does not hold them, so they would not move: "
                f"{listed(lost)}. Add them: optimizer.add_param_group({{'params': [...], 'lr': ...}}), as Lightning's "
                "BaseFinetuning.unfreeze_and_add_param_group does; or unfreeze them before the training, in the "
                "callback's setup."
            )

    def share_gradients(self) -> None:
        """Give what DDP does not know, since it came later, the mean gradient over the processes."""
        if self._module.trainer.world_size > 1 and (late := self._trains - self._at_start):
            average_gradients([parameter for _, parameter in sorted(self._named().items()) if parameter in late])

    # ---- the optimizer

    @contextmanager
    def as_at_start(self) -> Iterator[None]:
        """Within the block only that requires a gradient with which the training began, for its optimizer."""
        late = [self._named()[name] for group in self._past.get("groups", ()) for name in group["names"]]
        for parameter in late:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in late:
                parameter.requires_grad_(True)

    def renew_groups(self, made: Any) -> None:
        """Give a new optimizer the groups that the checkpoint's had got, and its schedule their places."""
        optimizer: Optimizer = made["optimizer"]
        self._groups_at_start = len(optimizer.param_groups)
        self._resumed = None
        named = self._named()
        for group in self._past.get("groups", ()):
            first = optimizer.param_groups[reference(optimizer.param_groups[: self._groups_at_start])]
            rate = first["lr"] * group["share"]
            optimizer.add_param_group({"params": [named[name] for name in group["names"]], "lr": rate})
        if "lr_scheduler" in made:
            follow(made["lr_scheduler"]["scheduler"])
        self._groups_seen = len(optimizer.param_groups)
        if self._past:
            self._resumed = list(optimizer.param_groups)
            for name, parameter in named.items():
                parameter.requires_grad_(name in self._past["trains"])
        self._past = {}
        self.look()

    def keep_groups(self, optimizer: Optimizer) -> None:
        """Lightning's BaseFinetuning puts groups of its own into a resumed optimizer, which may lack some."""
        if self._resumed is not None:
            optimizer.param_groups = self._resumed

    # ---- checkpoints

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Say in a checkpoint what is not as at the start."""
        groups = self._added_groups()
        if groups or self._owned or self._trains != self._at_start:
            trains = [name for name, p in self._named().items() if p.requires_grad]
            checkpoint[_KEY] = {"owned": self._owned, "groups": groups, "trains": trains}

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Have the adapter own what the checkpoint's did, before its state is loaded."""
        past = checkpoint.get(_KEY)
        if past is None:
            return
        if self._module.adapter is None:
            self._module.configure_model()
        assert self._module.adapter is not None
        named, own = dict(self._module.adapter.model.named_parameters()), self._module.adapter.parameters()
        if lost := [name for name in past["owned"] if name not in named]:
            raise UserError(f"The checkpoint is of a training that unfroze {listed(lost)}, which this base has not.")
        self._take([name for name in past["owned"] if name not in own])
        for name in [name for group in past["groups"] for name in group["names"]]:
            named[name].requires_grad_(True)
        if self._module._trainer and self._module.trainer.state.fn == TrainerFn.FITTING:
            self._past = past

    def _added_groups(self) -> list[dict[str, Any]]:
        optimizers = self._module.trainer.optimizers
        if self._groups_at_start is None or not optimizers:
            return []
        names = {parameter: name for name, parameter in self._named().items()}
        groups = optimizers[0].param_groups
        first = groups[reference(groups[: self._groups_at_start])]
        return [{"names": [names[parameter] for parameter in group["params"]], "share": share_of_rate(group, first)}
                for group in groups[self._groups_at_start :]]  # fmt: skip

    def _named(self) -> dict[str, nn.Parameter]:
        assert self._module.adapter is not None
        return self._module.adapter.parameters()
