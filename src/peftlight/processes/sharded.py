"""FSDP2: the frozen base sharded over all processes, and put together block by block while it computes."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from peftlight.errors import UserError
from peftlight.processes.units import indivisible, units_of
from peftlight.shards import is_sharded, sharded_like, whole
from peftlight.strategy import Adapter
from peftlight.tasks import PEFTModule
from peftlight.tasks.averaging import average_gradients


class FSDP2Strategy(ModelParallelStrategy):
    """Fully sharded data parallelism for a task of peftlight: `--trainer.strategy fsdp2`.

    Every process holds a part of each frozen tensor, and puts a block together while it computes with it. Checkpoints
    are those of a single process: one file, with what the adapter owns.
    """

    def __init__(
        self,
        shard_adapter: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        """
        Args:
            shard_adapter: whether what trains is sharded too, with its optimizer state; otherwise every process holds
                all of it, which saves communication. Where blocks share a trained tensor it is held whole anyway.
            process_group_backend: gloo or nccl; none: what fits the device.
            timeout: after which a process gives up waiting for the others.
        """
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        self.shard_adapter = shard_adapter
        self._copies: list[nn.Parameter] = []

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the model that `configure_model` made, before the optimizer is.

        Raises:
            UserError: the module is no task of peftlight, or what it is asked for does not go with shards.
        """
        module = self.lightning_module
        if not isinstance(module, PEFTModule) or module.adapter is None:
            raise UserError(f"fsdp2 shards the tasks of peftlight; {type(module).__name__} is none. Choose ddp.")
        if trainer.predicting:
            raise UserError(
                "Under fsdp2 all processes compute at once, and of the rows to predict some have more than others. "
                "Choose --trainer.strategy ddp, or --trainer.devices 1."
            )
        if trainer.precision == "16-mixed":
            raise UserError(
                "16-mixed scales the loss by what all gradients hold, and under fsdp2 each process sees a part of "
                "them. Choose --trainer.precision bf16-mixed, or --trainer.strategy ddp."
            )
        self.model = self.precision_plugin.convert_module(module)
        if not isinstance(module.adapter.model, FSDPModule):
            self._shard(module.adapter)
        self._copies = [p for p in module.adapter.parameters().values() if not is_sharded(p)]
        super().setup(trainer)

    def _shard(self, adapter: Adapter) -> None:
        model, trained = adapter.model, set(adapter.parameters().values())
        held_whole = indivisible(model)
        if not self.shard_adapter or held_whole & trained:
            held_whole |= trained
        mesh = self.device_mesh["data_parallel"]
        for unit in units_of(model).values():
            _spread(unit, self.root_device)
            # Outside of a forward everything is sharded, what lies around the blocks too, whoever reads the model then.
            fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=held_whole)
        if hasattr(model, "generate"):
            register_fsdp_forward_method(model, "generate")

    def post_backward(self, closure_loss: Tensor) -> None:
        average_gradients(self._copies)

    # ---- checkpoints: those of a single process

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """A checkpoint may change the shapes of what trains (EVA), so it is read before anything is sharded."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module = self.lightning_module
        assert isinstance(module, PEFTModule)
        assert module.adapter is not None
        with module.adapter.whole():
            return {f"model.{name}": value.cpu() for name, value in module.adapter.state().items()}

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        ParallelStrategy.load_model_state_dict(self, checkpoint, strict)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        ParallelStrategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = ParallelStrategy.optimizer_state(self, optimizer)
        return {**state, "state": {number: _whole(kept) for number, kept in state["state"].items()}}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        if not states:
            return  # another optimizer was allowed, which begins anew
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(_sharded_state(state, optimizer))


def _spread(unit: nn.Module, device: torch.device) -> None:
    """Let every process begin with the first one's values, as DDP does."""
    unit.to(device)
    for tensor in (*unit.parameters(), *unit.buffers()):
        if not is_sharded(tensor):
            # A copy: the pages of a weights file are shared by all processes as long as nobody writes in them.
            value = tensor.detach().clone(memory_format=torch.contiguous_format)
            dist.broadcast(value, 0)
            tensor.data = value


def _whole(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {name: whole(value).cpu() if isinstance(value, Tensor) else value for name, value in kept.items()}


def _sharded_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's state as of a single process, laid out as the parameters here are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=True))
    return {**state, "state": {number: _laid_out(kept, of[number]) for number, kept in state["state"].items()}}


def _laid_out(kept: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """What an optimizer keeps of a parameter, with that of its shape sharded as it is."""
    return {
        name: sharded_like(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
        for name, value in kept.items()
    }


StrategyRegistry.register("fsdp2", FSDP2Strategy, "Fully sharded data parallelism, for the tasks of peftlight")
