"""The end of the process group when Python ends."""

import atexit

import torch.distributed as dist


def end_group_at_exit() -> None:
    """Have the process group end before the interpreter does; for processes that end in good order.

    gloo's thread may still hold the tensors of the last message. To let go of them it needs the interpreter, and one
    that is already ending ends the thread instead, which aborts the process. Ending the group waits for the thread.
    """
    atexit.unregister(_end_group)
    atexit.register(_end_group)


def _end_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
