"""Whether a model has an embedding for each token of the data."""

from typing import Any

from torch import nn

from peftlight.errors import UserError
from peftlight.paths import input_embedding


def check_vocabulary(model: nn.Module, datamodule: Any) -> None:
    """See that the rows of the data module, and their padding, are of tokens that the model knows.

    Raises:
        UserError: the data's tokenizer is not the model's. On a GPU the run would end without a word of why.
    """
    embedding = input_embedding(model)
    words = getattr(embedding, "num_embeddings", None)
    tokenizer = getattr(datamodule, "tokenizer", None)
    summaries = (getattr(datamodule, "summaries", None) or {}).values()
    largest = max((getattr(summary, "largest_token", -1) for summary in summaries), default=-1)
    largest = max(largest, getattr(tokenizer, "pad_token_id", None) or -1)
    if words is not None and largest >= words:
        given = [f"data.{option}" for option in ("tokenizer", "pad_token") if _is_given(datamodule, option)]
        name = getattr(tokenizer, "name_or_path", "") or "given"
        whose = (
            f"Leave {' and '.join(given)} out, or give the model's." if given
            else "It came with the model, whose files do not belong together: fetch them again, or name the tokenizer "
            "that the model was trained with: --data.tokenizer NAME"
        )  # fmt: skip
        raise UserError(
            f"The data holds token {largest}, and the model has embeddings for {words} tokens, 0 to {words - 1}. The "
            f"tokenizer ({name}) is not this model's. {whose}"
        )


def _is_given(datamodule: Any, option: str) -> bool:
    """Whether the user chose it; a data module of the user's own may have chosen anything."""
    return getattr(datamodule, f"_given_{option}", getattr(datamodule, option, None)) is not None
