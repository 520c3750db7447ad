"""The number format of computing where none is asked for."""

import time

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

_SLOW = 1.5
"""How many times as long a product may take as in float32 before it is worth a line."""


def default_precision(dtype: str, on_gpu: bool) -> str:
    """Lightning's word for it: bf16 where the card has it, float32 elsewhere; half precision if the base is in it.

    It is mixed, so that adapters and heads stay in float32.

    Args:
        dtype: number format of the base.
        on_gpu: whether a graphics card may be used, if there is one.
    """
    on_gpu = on_gpu and torch.cuda.is_available()
    if dtype in ("bfloat16", "float16"):
        return "16-mixed" if dtype == "float16" and on_gpu else "bf16-mixed"
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def tell_of_slow_precision(trainer: Trainer) -> None:
    """Say it where the CPU takes longer in 16 bits than in 32: few have instructions for them, most of those for one.

    What it computes with is measured, not looked up.
    """
    dtype = _half(str(trainer.precision))
    if dtype is None or trainer.strategy.root_device.type != "cpu":
        return
    times = seconds_of_product(dtype) / seconds_of_product(torch.float32)
    if times > _SLOW:
        rank_zero_info(
            f"precision {trainer.precision}: this CPU takes {times:.0f} times as long for a product of matrices in "
            f"{str(dtype).removeprefix('torch.')} as in float32. For float32: --trainer.precision 32-true, and "
            "--model.dtype float32"
        )


def seconds_of_product(dtype: torch.dtype) -> float:
    """How long the CPU takes for a product of two matrices; the shortest of three times."""
    one, other = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
    taken = []
    for _ in range(4):
        start = time.perf_counter()
        torch.matmul(one, other)
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _half(precision: str) -> torch.dtype | None:
    """The format of 16 bits that is computed in, if any."""
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else None
