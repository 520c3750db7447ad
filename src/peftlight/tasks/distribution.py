"""Which of Lightning's ways to train on several processes are known here."""

from typing import Any

from peftlight.errors import UserError

_OTHERS = {
    "fsdp": "FSDP1, which cannot train a part of a module's parameters,",
    "deepspeed": "DeepSpeed",
    "modelparallel": "Lightning's plain ModelParallelStrategy, which shards nothing by itself,",
}


def refuse_other_sharding(strategy: Any) -> None:
    """See that a strategy of Lightning's, an object or a name, is one whose gradients and adapters are right here.

    Raises:
        UserError: it is FSDP1, DeepSpeed or the plain ModelParallelStrategy.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__.removesuffix("Strategy")
    kind = next((kind for kind in _OTHERS if name.lower().startswith(kind)), None)
    if kind and not name.lower().startswith("fsdp2"):
        raise UserError(
            f"trainer.strategy is {_OTHERS[kind]} and is not supported. Choose fsdp2 (the base is sharded over the "
            "processes) or ddp (each process holds all of it)."
        )
