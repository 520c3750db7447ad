"""The number format of computing where none is asked for."""

import torch


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
