"""The base model of a task with its strategy on it, and what is refused before it trains."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftlight.errors import UserError, listed
from peftlight.paths import own_parameters
from peftlight.pretrained import checkpoint_gradients
from peftlight.quantization import in_float32
from peftlight.strategy import Adapter, attach
from peftlight.tasks.preparation import Initial

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule

_HALF = (torch.bfloat16, torch.float16)


def adapted_base(module: "PEFTModule", initial: Initial | None) -> Adapter:
    """Load the base, attach the strategy, and put what trains into float32.

    Args:
        module: the task, which stays as it is.
        initial: what the adapter begins with in place of the strategy's own start.

    Raises:
        UserError: there is no base, the strategy does not fit it, or a new head would stay random.
    """
    model, new = _base(module)
    new += [name for name in module.look_at_base(model, new) if name not in new]
    heads = module.heads(model, new) if module.trained_modules is None else module.trained_modules
    if initial is not None:
        initial.take(module, model)
    adapter = attach(model, module.strategy, modules_to_train=heads)
    _refuse_untrained(module, adapter, new)
    adapter.train_in_float32()
    if initial is not None:
        initial.give(adapter)
    if module.quantization is not None:
        in_float32(model, heads)
        for delta in adapter.sites.values():  # what the adapter trains in place stays as it is
            delta.put_into(getattr(torch, module.adapter_dtype))
    if module.gradient_checkpointing:
        checkpoint_gradients(model)
    return adapter


def _base(module: "PEFTModule") -> tuple[nn.Module, list[str]]:
    """The base model, and the names of the parameters that no file held."""
    device = module._trainer.strategy.root_device if module._trainer else torch.device("cpu")
    if module.model is not None:
        if module.quantization is not None:
            module.quantization.apply(module.model, device)
        return module.model, []
    if module.source is None:
        raise UserError("There is no base model: it was given as an object, which no checkpoint holds. "
                        "Give it again: load_from_checkpoint(path, base_model=model).")  # fmt: skip
    held: dict[str, Any] = {"quantization": module.quantization, "device": device} if module.quantization else {}
    return module.source.load_model(module.auto_class, module.dtype_of_base, **held, **module.model_options())


def _refuse_untrained(module: "PEFTModule", adapter: Adapter, new: Sequence[str]) -> None:
    lost = sorted(set(new) - set(adapter.parameters()))
    if lost:
        raise UserError(
            f"The head is missing: {module._base_name()} has no weights for {listed(lost)}, so they are random, and "
            "nothing would train them. Choose a model made for this task, or list their modules in "
            "model.trained_modules."
        )


def check_precision(module: "PEFTModule", adapter: Adapter) -> None:
    """See that what trains stays in float32, and meets a base in half precision under automatic mixed precision.

    Raises:
        UserError: the trainer computes in another precision.
    """
    trainer = module._trainer
    if trainer and trainer.training and trainer.precision == "bf16-true":
        raise UserError(
            "trainer.precision is bf16-true, which puts what is trained into bfloat16, too: the steps of a training "
            "are lost there beside values near one, so that IA3's vectors, say, never move. The base takes as little "
            "memory with --trainer.precision bf16-mixed --model.dtype bfloat16."
        )
    mixes = adapter.trained or module.quantization
    base_is_half = any(p.dtype in _HALF for _, p in own_parameters(adapter.model))
    if base_is_half and mixes and trainer and "mixed" not in trainer.precision:
        kept = listed(adapter.trained, 3) or "heads and normalisations of a quantized base"
        raise UserError(
            f"model.dtype is {module.dtype_of_base} and {kept} stay in float32: the two "
            f"meet only under automatic mixed precision, but trainer.precision is {trainer.precision}. "
            "Set --trainer.precision bf16-mixed, or --model.dtype float32."
        )
