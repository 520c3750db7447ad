"""Errors that libraries raise in the middle of a run and that the configuration or the machine causes."""

import re
from collections.abc import Callable, Sequence

from peftlight.config_errors.given import find, read_given
from peftlight.errors import UserError, listed, nearest


def explained(error: Exception, arguments: Sequence[str]) -> UserError | None:
    """What to tell a person about `error`, to which `arguments` have led; None if it is not known."""
    text = str(error)
    for pattern, sentence in _SENTENCES.items():
        if match := re.search(pattern, text, re.DOTALL):
            return UserError(sentence(arguments, *match.groups()))
    return None


def _place(arguments: Sequence[str], path: str, value: str | None = None) -> str:
    found = find(read_given(arguments), tuple(path.split(".")), value)
    return f"{found.where}: " if found else ""


def _no_metric(arguments: Sequence[str], name: str, known: str) -> str:
    metrics = re.findall(r"\w+", known)
    return (f"{_place(arguments, 'trainer.callbacks.monitor', name)}there is no metric {name!r} to monitor."
            f"{nearest(name, metrics)}\n  Known: {listed(metrics, 20)}.")  # fmt: skip


def _seed(arguments: Sequence[str], seed: str, largest: str) -> str:
    return f"{_place(arguments, 'seed_everything')}the seed is {seed}; expected a whole number from 0 to {largest}."


def _half_on_cpu(arguments: Sequence[str]) -> str:
    return (
        "The CPU does not compute in float16 together with float32, as model.dtype and trainer.precision ask. Take "
        "--model.dtype float32 --trainer.precision 32-true, or bfloat16 and bf16-mixed."
    )


def _tasks(arguments: Sequence[str], count: str) -> str:
    return (
        f"The SLURM job has {count} tasks in all (SLURM_NTASKS), and Lightning starts from the tasks of each machine: "
        f"#SBATCH --ntasks-per-node={count}. To run one process: unset SLURM_NTASKS"
    )


def _no_memory(arguments: Sequence[str], device: str) -> str:
    return (
        f"{device} has no memory left for this step. In the order of their cost: a smaller --data.batch_size with more "
        "--trainer.accumulate_grad_batches, a smaller --data.max_length, --model.gradient_checkpointing true, "
        "--model.dtype bfloat16, or a base in 4 bits: --trainer.callbacks+=Quantize"
    )


def _port_taken(arguments: Sequence[str], port: str) -> str:
    return (
        f"The processes cannot meet at port {port}, MASTER_PORT in the environment: another program has it, perhaps "
        "another run. Set MASTER_PORT to a free one; for processes of this machine alone: unset MASTER_PORT"
    )


def _one_to_predict(arguments: Sequence[str]) -> str:
    return (
        "predict_dataloader of the data gives several loaders; predictions are written of one, by the numbers of its "
        "rows. Return one, of a torch.utils.data.ConcatDataset for example."
    )


def _by_position(arguments: Sequence[str], name: str) -> str:
    return (
        f"A DataLoader of the data gets its {name} by position, and Lightning, which makes it anew to share out the "
        f"rows, cannot tell it from its own. Name it: DataLoader(rows, {name}=...)."
    )


_SENTENCES: dict[str, Callable[..., str]] = {
    r"Early stopping conditioned on metric `([^`]+)` which is not available.*?following: (.*)": _no_metric,
    r"ModelCheckpoint\(monitor='([^']+)'\)` could not find .*?: \[(.*?)\]": _no_metric,
    r"(-?\d+) is not in bounds, numpy accepts from 0 to (\d+)": _seed,
    r"You set `--ntasks=(\d+)` in your SLURM": _tasks,
    r"mixed dtype \(CPU\)": _half_on_cpu,
    r"(CUDA) out of memory": _no_memory,
    r"multiple `predict_dataloader`": _one_to_predict,
    r"can be passed to its parent's `(\w+)=": _by_position,
    r"failed to listen.*port: (\d+).*EADDRINUSE": _port_taken,
}
"""What the libraries say."""
