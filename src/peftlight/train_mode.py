"""Train mode for what trains, and only for that."""

from torch import nn

from peftlight.strategy import Adapter


def put_in_train_mode(adapter: Adapter) -> None:
    """Models from transformers come in eval mode and Lightning leaves them so: dropout would stay off.

    Running statistics that the adapter does not save are part of the frozen base, so they stand still.
    """
    adapter.model.train()
    saved = adapter.state()
    for name, module in adapter.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.train(f"{name}.running_mean".lstrip(".") in saved)
