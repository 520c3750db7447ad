"""What the environment's variables say, settled before a library reads them; and which process this is."""

import logging
import os

from peftlight.errors import UserError

_REPORTS = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # the hub's client: versions, and the agent that runs it, in every request
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets: each loaded data set is reported
    "DISABLE_SAFETENSORS_CONVERSION": "1",  # transformers: has a server convert a pickle, and hands it the user's token
}
"""What the libraries below tell others without being asked, and the value that stops it."""
_NUMBERS = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NODEID", "SLURM_NTASKS", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_SIZE",
)  # fmt: skip
"""Variables of launchers; some are read when Lightning is imported."""

RUN_FOLDER, CHECKPOINT = HANDED_ON = ("PEFTLIGHT_RUN_FOLDER", "PEFTLIGHT_CHECKPOINT")
"""Set by the first process while a run lasts, for the processes that it starts: what it has made or found by then."""


def is_first_process() -> bool:
    """Whether this process is the first of all machines' processes, as far as it is known by now."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"


def settle_environment() -> None:
    """Switch off what reports to others, unless the user decided, and see that the launcher's numbers are numbers.

    Raises:
        UserError: a launcher's variable is no number.
    """
    for name, silent in _REPORTS.items():
        os.environ.setdefault(name, silent)
    # Each import of bitsandbytes advises to install what would fetch code from the hub and run it.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for name in _NUMBERS:
        value = os.environ.get(name)
        if value is not None and not value.isdecimal():
            raise UserError(
                f"The environment variable {name} is {value!r}; expected a whole number, as launchers such as torchrun "
                f"set it. To run one process: unset {name}"
            )
