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
    launcher, started, machines = _started() or ("", asked, trainer.num_nodes)
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
