"""Whether a model and a data set are of the kind that a task trains; refused before training where they are not."""

from typing import Any

from peftlight.errors import UserError
from peftlight.tasks.base import PEFTModule

_DATA = {
    "CausalLM": "Instructions, Messages or PlainText",
    "ImageClassification": "Images",
    "Seq2Seq": "SourceTarget or InstructionPairs",
    "SequenceClassification": "TextClassification",
    "TokenClassification": "TaggedWords",
}
"""The families of data that a task learns from."""


def check_kinds(module: PEFTModule, encoder_decoder: bool) -> None:
    """Refuse a model that is no decoder (or no encoder-decoder), and data that makes the rows of another task.

    Raises:
        UserError: naming the nearest task. A model without a configuration, as researchers write them, is taken as is.
    """
    task = type(module)
    if module.adapter is None:
        config = module.source.load_config() if module.source else module._config()
        if getattr(config, "is_encoder_decoder", encoder_decoder) != encoder_decoder:
            name = f"{module._base_name()} is {'not ' if encoder_decoder else ''}an encoder-decoder"
            raise UserError(
                f"{name} ({config.model_type}), and {task.__name__} trains {_nearest(config, encoder_decoder)}"
            )
    refuse_other_data(task, module._datamodule())


def _nearest(config: Any, encoder_decoder: bool) -> str:
    """What the task trains, and which task trains the model."""
    if not encoder_decoder:
        task = f"train it with Seq2Seq, on {_DATA['Seq2Seq']}"
        return f"decoders, such as GPT-2 or Llama: {task}, or choose another model."
    from transformers.models.auto import modeling_auto

    task = ""
    if config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        task = "It is an encoder: train it with SequenceClassification, or choose another."
    elif config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        task = f"It is a decoder: train it with CausalLM, on {_DATA['CausalLM']}, or choose another."
    return f"those, such as T5 or BART. {task or 'Choose another model.'}"


def refuse_other_data(task: type, data: Any) -> None:
    """Raise if the data makes the labels of another task: those of a decoder's rows hold the answer in the input."""
    wanted = getattr(data, "made_for", "")
    if not wanted or wanted in {parent.__name__ for parent in task.__mro__}:
        return
    known = next(parent.__name__ for parent in task.__mro__ if parent.__name__ in _DATA)
    raise UserError(
        f"{type(data).__name__} makes the rows of {wanted}, and the model is a {task.__name__}. "
        f"Choose {_DATA[known]} as the data, or {wanted} as the model."
    )
