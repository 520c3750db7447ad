"""How many tokens a model has positions for, found by structure."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

Side = Literal["rows", "targets"]
"""What a model reads, and what the decoder of an encoder-decoder writes."""


@dataclass(frozen=True)
class Positions:
    """The most tokens of a row; None: there is no end."""

    tabled: int | None
    """As many as a table of learned positions has; the next token makes the model fail."""
    trained: int | None
    """As many as the model was made for, where it would compute with more."""


def positions_of(model: nn.Module, side: Side = "rows") -> Positions:
    """The positions that the model has for its rows, or for the targets that its decoder writes."""
    config: Any = getattr(model, "config", None)
    apart = bool(getattr(config, "is_encoder_decoder", False))
    tables = [
        count for name, module in model.named_modules()
        if (count := _count(name, module)) is not None and (not apart or _is_of(name, side))
    ]  # fmt: skip
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    told = getattr(text, "max_position_embeddings", None)
    most = [told] if isinstance(told, int) and told > 0 else []
    return Positions(min([*tables, *most]), None) if tables else Positions(None, most[0] if most else None)


def _count(name: str, module: nn.Module) -> int | None:
    """How many tokens a table of positions serves; None where the module is none."""
    last = name.rpartition(".")[2]
    if not isinstance(module, nn.Embedding) or "relative" in last or not ("position" in last or last == "wpe"):
        return None
    # RoBERTa and its relatives count from the position after that of padding, BART and OPT from their offset.
    before = 0 if module.padding_idx is None else module.padding_idx + 1
    return module.num_embeddings - int(getattr(module, "offset", before))


def _is_of(name: str, side: Side) -> bool:
    return ("decoder" in name.split(".")) == (side == "targets")
