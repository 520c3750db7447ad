"""Rendered text and its masks: which tokens are labels follows from spans of the text, never from searching tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from peftlight.data.encoder import Encoder, Row
from peftlight.data.tokenizer import Tokenizer, bos_id, eos_id
from peftlight.data.tokens import EncodedRow


class Segment(NamedTuple):
    """A stretch of rendered text, and whether the model learns to write it."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class CausalEncoder(Encoder):
    """Rows of a language model: a family says how a row is rendered, the rest is the same for all."""

    left_padded: ClassVar[bool] = True
    adds_eos: ClassVar[bool] = True

    def render(self, row: Row, tokenizer: Tokenizer) -> list[Segment]:
        """The row's text in order; for "predict" only what stands before the answer."""
        raise NotImplementedError

    def tokenize(self, rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[EncodedRow]:
        """The tokens and masks of each row; each text is tokenized once and as a whole."""
        rendered = [self.render(row, tokenizer) for row in rows]
        encoded = tokenizer(
            ["".join(segment.text for segment in segments) for segments in rendered],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        bos, eos = bos_id(tokenizer), None
        if self.adds_eos and self.purpose != "predict":
            eos = eos_id(tokenizer)
        for segments, ids, spans in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            mask = trained_tokens(segments, spans).tolist()
            if bos is not None and ids[:1] != [bos]:
                ids, mask = [bos, *ids], [0, *mask]
            if eos is not None and ids[-1:] != [eos]:
                ids, mask = [*ids, eos], [*mask, int(segments[-1].trained and segments[-1].text != "")]
            yield self._cut(ids, mask, keep_first=bos is not None)

    def _cut(self, ids: list[int], mask: list[int], keep_first: bool) -> EncodedRow:
        if self.purpose == "predict":
            return EncodedRow(_last(ids, self.max_length, keep_first), len(ids))
        return EncodedRow(ids[: self.max_length], len(ids), np.asarray(mask[: self.max_length], np.uint8))


def _last(ids: list[int], count: int, keep_first: bool) -> list[int]:
    """A prompt is cut at its beginning: its end is what the answer follows."""
    if len(ids) <= count:
        return ids
    first = ids[:1] if keep_first else []
    return first + ids[len(ids) - count + len(first) :]


def trained_tokens(segments: Sequence[Segment], spans: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """Per token: 1 if its span of characters overlaps a trained segment."""
    if all(segment.trained for segment in segments):
        return np.ones(len(spans), np.uint8)
    characters = np.repeat([segment.trained for segment in segments], [len(segment.text) for segment in segments])
    before = np.concatenate([[0], np.cumsum(characters)])
    starts, ends = np.asarray(spans, np.int64).reshape(-1, 2).T
    # Some tokenizers report a token of white space alone as a span of no characters; it begins where the last ended.
    starts = np.where(starts == ends, np.minimum(starts, np.concatenate([[0], ends[:-1]])), starts)
    return (before[ends] > before[starts]).astype(np.uint8)
