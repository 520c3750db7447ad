"""What HF PEFT calls LORA: a LoRA, single tokens trained with it or alone, or a LoRA of zeros that carries biases."""

from torch import nn

from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf import in_place, lora, renames, tokens


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that HF PEFT's files describe, to be put on `model` under `name`.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    config, tensors = renames.translated(config, tensors, model)
    if config.get("trainable_token_indices"):
        return tokens.with_lora_from_peft(config, tensors, model, name)
    if in_place.holds_bitfit(config, tensors, model):
        return in_place.bitfit_from_peft(config, tensors, model, name)
    return lora.from_peft(config, tensors, model, name)
