"""Which of Lightning's ways to train on several processes are known here."""

from typing import Any

from peftlight.errors import UserError

_OTHERS = {
    "fsdp": "FSDP1, which cannot train a part of a module's parameters,",
    "deepspeed": "DeepSpeed",
    "modelparallel": "Lightning's plain ModelParallelStrategy, which shards nothing by itself,",
    **{
        f"ddp_{kind}": f"DDP in forked or spawned processes ({kind}), which would keep to themselves what they trained,"
        for kind in ("spawn", "fork", "notebook")
    },
}


def refuse_other_distribution(strategy: Any) -> None:
    """See that a strategy of Lightning's, an object or a name, is one whose gradients and adapters are right here.

    Raises:
        UserError: it is FSDP1, DeepSpeed, the plain ModelParallelStrategy, or DDP in forked processes.
    """
    if kind := refused_kind(strategy if isinstance(strategy, str) else _name(strategy)):
        raise UserError(
            f"trainer.strategy is {_OTHERS[kind]} and is not supported. Choose fsdp2 (the base is sharded over the "
            "processes) or ddp (each process holds all of it)."
        )


def refused_kind(name: str) -> str | None:
    """What kind of refused distribution a strategy of this name is; None if it is none."""
    if name.lower().startswith("fsdp2"):
        return None
    return next((kind for kind in _OTHERS if name.lower().startswith(kind)), None)


def _name(strategy: Any) -> str:
    started = getattr(strategy, "_start_method", "popen")  # private, but an object of Lightning's says it nowhere else
    return type(strategy).__name__.removesuffix("Strategy") + ("" if started == "popen" else f"_{started}")
