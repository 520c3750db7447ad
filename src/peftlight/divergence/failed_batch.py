"""The file that keeps the batch with which a training failed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from peftlight.divergence.micro_batch import MicroBatch
from peftlight.files import as_os_error, write_atomically

FAILED_BATCH = "failed_batch.safetensors"


def store(folder: Path, micro: MicroBatch, facts: Mapping[str, Any]) -> Path:
    """Write the batch's tensors and the random state in which it was computed; the facts go into the file's metadata.

    Raises:
        UserError: the file cannot be written.
    """
    tensors = {**micro.tensors(), "random_state": micro.random_state}
    if micro.random_state_of_gpu is not None:
        tensors["random_state_of_gpu"] = micro.random_state_of_gpu
    on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}

    def write(path: Path) -> None:
        try:
            save_file(on_cpu, path, metadata={"failed": json.dumps(facts)})
        except SafetensorError as error:
            raise as_os_error(error) from error

    write_atomically(folder / FAILED_BATCH, write)
    return folder / FAILED_BATCH
