"""Texts as a tokenizer frames them with its special tokens, cut by its own rules where they are too long."""

from collections.abc import Sequence
from typing import NamedTuple

from peftlight.data.tokenizer import Tokenizer
from peftlight.errors import UserError


class Texts(NamedTuple):
    """One text, or two that belong together."""

    text: str
    pair: str | None = None


class Framed(NamedTuple):
    """One row of tokens."""

    ids: list[int]
    """The tokens, special ones included."""
    length: int
    """How many there were before the row was cut."""
    types: list[int] | None
    """Per token: which text of a pair it is from; None for single texts and for models that do not ask."""
    spans: list[tuple[int, int]]
    """Per token: its first character and the one after its last; nothing if not asked for."""


def framed(
    texts: Sequence[Texts], tokenizer: Tokenizer, max_length: int, spans: bool = False, target: bool = False
) -> list[Framed]:
    """The tokens of each text; only what is too long is tokenized again, to be cut.

    Args:
        texts: the rows, all single or all pairs.
        tokenizer: a fast tokenizer.
        max_length: most tokens of a row, special ones included.
        spans: whether to say where in the text each token stands.
        target: whether the texts are what a decoder writes, which some tokenizers frame otherwise.
    """
    rows = _called(texts, tokenizer, None, spans, target)
    long = [index for index, row in enumerate(rows) if row.length > max_length]
    if long:
        short = _called([texts[index] for index in long], tokenizer, max_length, spans, target)
        for index, row in zip(long, short, strict=True):
            rows[index] = row._replace(length=rows[index].length)
    return rows


def _called(
    texts: Sequence[Texts], tokenizer: Tokenizer, max_length: int | None, spans: bool, target: bool
) -> list[Framed]:
    paired = texts[0].pair is not None
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    if max_length is not None and max_length <= special + paired:
        name = "max_target_length" if target else "max_length"
        raise UserError(f"{name}={max_length} leaves no room for text beside {special} special tokens.")
    typed = paired and "token_type_ids" in tokenizer.model_input_names
    columns = {"text_target" if target else "text": [row.text for row in texts]}
    if paired:
        columns["text_pair"] = [str(row.pair) for row in texts]
    encoded = tokenizer(
        **columns,
        truncation=max_length is not None,
        max_length=max_length,
        return_token_type_ids=typed,
        return_offsets_mapping=spans,
        return_attention_mask=False,
        verbose=False,
    )
    types = encoded["token_type_ids"] if typed else [None] * len(texts)
    places = encoded["offset_mapping"] if spans else [[]] * len(texts)
    return [Framed(ids, len(ids), *rest) for ids, *rest in zip(encoded["input_ids"], types, places, strict=True)]
