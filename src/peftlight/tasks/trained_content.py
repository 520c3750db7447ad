"""What a checkpoint holds of a task's model: what is trained, and how the base was held that it was trained on."""

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peftlight.errors import UserError, listed
from peftlight.finite import not_finite
from peftlight.strategy_spec import spec_of
from peftlight.tasks.hyperparameters import kept_options
from peftlight.wrappers import without_wrapper

if TYPE_CHECKING:
    from peftlight.tasks.base import PEFTModule


def keep_trained(module: "PEFTModule", checkpoint: dict[str, Any]) -> None:
    """Leave the frozen base out of a checkpoint, and say in it what the rest belongs to.

    Raises:
        UserError: a trained tensor, or what the optimizer keeps of it, is not finite.
    """
    own = module.own_state()
    named = {without_wrapper(key): value for key, value in checkpoint["state_dict"].items()}
    checkpoint["state_dict"] = {key: value for key, value in named.items() if key in own}
    _refuse_not_finite(module, checkpoint)
    checkpoint["quantization"] = _held(module)
    strategy = spec_of(module.strategy)  # it may have been settled
    kept = kept_options(module.hparams, module._plain_hyperparameters())
    checkpoint["hyper_parameters"] = {**kept, "strategy": strategy}


def forget_frozen(module: "PEFTModule", incompatible: Any) -> None:
    """Have a state without the frozen base count as whole, whatever holds the task (an average, say) and loads it."""
    if module.adapter is None:
        return
    own, every = module.own_state(), {f"model.{key}" for key in module.adapter.model.state_dict()}
    for key in list(incompatible.missing_keys):
        name = key[key.index("model.") :] if "model." in key else key
        if name in every - own:
            incompatible.missing_keys.remove(key)


def _refuse_not_finite(module: "PEFTModule", checkpoint: dict[str, Any]) -> None:
    before = f"No checkpoint is saved after step {module.trainer.global_step}: "
    if bad := not_finite(checkpoint["state_dict"].items()):
        raise UserError(
            f"{before}{len(bad)} trained tensors hold values that are not finite (NaN or infinite): {listed(bad)}. The "
            "earlier checkpoints are as they were; the last optimizer step was too large, so lower the learning rate."
        )
    optimizers = checkpoint.get("optimizer_states", [])
    kept = [each for optimizer in optimizers for each in optimizer["state"].values()]
    if bad := not_finite((key, value) for each in kept for key, value in each.items() if isinstance(value, Tensor)):
        raise UserError(
            f"{before}the optimizer keeps values that are not finite (NaN or infinite) of {len(bad)} trained tensors, "
            f"as their {listed(sorted(set(bad)))}, so it would not train them any more. The earlier checkpoints are as "
            "they were; a gradient was too large, so lower the learning rate, or cut gradients off "
            "(--trainer.gradient_clip_val 1.0)."
        )


def warn_of_other_base(module: "PEFTModule", checkpoint: dict[str, Any]) -> None:
    """Say it where the base is held in another way than it was trained on: the numbers are not quite the same."""
    there, here = checkpoint.get("quantization"), _held(module)
    if there != here:
        warnings.warn(
            f"The checkpoint was trained on a base held as {there or 'plain numbers'}; here it is held as "
            f"{here or 'plain numbers'}.",
            stacklevel=2,
        )


def _held(module: "PEFTModule") -> dict[str, Any] | None:
    return module.quantization.described() if module.quantization else None
