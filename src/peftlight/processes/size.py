"""How many processes there are, against how many the configuration asks for."""

import os

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment

from peftlight.errors import UserError

_BY_HAND = ("bash", "interactive")
"""Names of jobs in which Lightning starts the processes itself."""


def check_size(trainer: Trainer) -> None:
    """See that as many processes were started as the configuration asks for.

    Raises:
        UserError: fewer or more; each of them would train for itself, or wait for others that never come.
    """
    asked = trainer.num_devices * trainer.num_nodes
    launched = _started()
    if launched is None:
        _check_numbers(trainer, asked)
        return
    launcher, started, machines = launched
    if started != asked:
        raise UserError(
            f"{launcher} started {started} processes (machines: {machines}), but the configuration asks for {asked}: "
            f"trainer.devices is {trainer.num_devices}, trainer.num_nodes {trainer.num_nodes}. Set --trainer.devices "
            f"{started // machines} --trainer.num_nodes {machines}, or have {launcher} start as many as are asked for."
        )


def _started() -> tuple[str, int, int] | None:
    """Who started the processes, how many, on how many machines; None where the trainer starts them itself."""
    if dist.is_torchelastic_launched():
        everywhere, here = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
        return "torchrun", everywhere, max(1, everywhere // here)
    if "SLURM_STEP_NUM_TASKS" in os.environ and SLURMEnvironment.job_name() not in _BY_HAND:
        return "srun", int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ.get("SLURM_STEP_NUM_NODES", "1"))
    return None


def _check_numbers(trainer: Trainer, asked: int) -> None:
    """Without a launcher that is known, Lightning reads a launcher's numbers only in part."""
    world_size = os.environ.get("WORLD_SIZE", str(asked))
    if int(world_size) != asked:
        raise UserError(
            f"The environment variable WORLD_SIZE is {world_size}, but the configuration asks for {asked} processes "
            f"(trainer.devices {trainer.num_devices}, trainer.num_nodes {trainer.num_nodes}): each process would train "
            "for itself. Start them by torchrun, and set --trainer.devices and --trainer.num_nodes to as many; or, for "
            "what the configuration asks for: unset WORLD_SIZE"
        )
    machines, here = ("trainer.num_nodes", trainer.num_nodes), ("trainer.devices", trainer.num_devices)
    for name, (option, count) in {"NODE_RANK": machines, "GROUP_RANK": machines, "LOCAL_RANK": here}.items():
        if int(os.environ.get(name, "0")) >= count:
            raise UserError(f"The environment variable {name} is {os.environ[name]}, and ranks count from 0: with "
                            f"{option} {count} there is none such. Set --{option}, or: unset {name}")  # fmt: skip
