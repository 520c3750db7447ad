"""Texts, or pairs of texts, with a class each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import numpy as np

from peftlight.data.cells import column_of, required_column, text_cells
from peftlight.data.encoder import Encoder, Purpose, Row
from peftlight.data.labels import all_unknown, label_cells, label_indices, names_of
from peftlight.data.module import TextData
from peftlight.data.table import Table
from peftlight.data.tokenizer import Tokenizer
from peftlight.data.tokens import EncodedRow, Tokens
from peftlight.errors import UserError

_EXPECTED = ("text", "label")


@dataclass(eq=False, kw_only=True)
class TextClassification(TextData):
    """Rows of a text (or text and text_pair) and a label, which is a number counted from 0 or a name."""

    column_names: ClassVar[tuple[str, ...]] = ("text", "label", "text_pair")

    max_length: int = 256
    """Longer texts are cut to this many tokens."""
    labels: list[str] | None = None
    """The names of the labels in order; without it they are those found in the training split."""

    def encoder(self, purpose: Purpose, label_names: Sequence[str] | None) -> "ClassEncoder":
        """How rows become tokens."""
        names = None if label_names is None or purpose == "predict" else tuple(label_names)
        return ClassEncoder(columns=self.columns, max_length=self.max_length, purpose=purpose, names=names)

    def find_label_names(self, train: Callable[[], Tokens]) -> list[str] | None:
        """The labels in order; `train` gives the training split where they have to be found."""
        if self.labels is None:
            return train().label_names
        if len(set(self.labels)) < max(2, len(self.labels)):
            raise UserError(f"labels must be at least two different names; found {self.labels}.")
        return list(self.labels)


@dataclass(eq=False, kw_only=True)
class SST2(TextClassification):
    """Stanford Sentiment Treebank, two classes: 67,349 phrases of film reviews, with 872 sentences to validate on."""

    source: str = "stanfordnlp/sst2"
    columns: dict[str, str] = field(default_factory=lambda: {"text": "sentence"})
    labels: list[str] | None = field(default_factory=lambda: ["negative", "positive"])
    max_length: int = 128


class _Texts(NamedTuple):
    text: str
    pair: str | None


@dataclass(frozen=True, kw_only=True)
class ClassEncoder(Encoder):
    """Texts as the tokenizer frames them with its special tokens, and the index of each row's label."""

    names: tuple[str, ...] | None
    """The labels in order; None where they are to be found in the rows."""

    def encode(self, tables: Sequence[Table], tokenizer: Tokenizer) -> Tokens:
        """The tokens and labels of all rows."""
        if any(column_of(table, "text_pair", self.columns) for table in tables):
            for table in tables:
                required_column(table, "text_pair", (*_EXPECTED, "text_pair"), self.columns)
        if self.purpose == "predict" or (self.purpose == "test" and self.unlabelled(tables)):
            return super().encode(tables, tokenizer)
        cells = [label_cells(table, required_column(table, "label", _EXPECTED, self.columns)) for table in tables]
        names = list(self.names) if self.names else names_of(tables, cells)
        labels = [label_indices(table, part, names) for table, part in zip(tables, cells, strict=True)]
        return replace(super().encode(tables, tokenizer), labels=np.concatenate(labels), label_names=names)

    def unlabelled(self, tables: Sequence[Table]) -> str:
        """Why there are no labels; empty if there are."""
        reason = self.without_column(tables, "label")
        if reason:
            return reason
        cells = [label_cells(table, required_column(table, "label", _EXPECTED, self.columns)) for table in tables]
        unknown = all(all_unknown(part) for part in cells) and "-1" not in (self.names or ())
        return f"every label in {tables[0].name} is -1, which means unknown" if unknown else ""

    def rows(self, table: Table) -> list[_Texts]:
        """The text or texts of each row."""
        expected = ("text",) if self.purpose == "predict" else _EXPECTED
        texts = text_cells(table, required_column(table, "text", expected, self.columns))
        if "text_pair" not in self.columns and not column_of(table, "text_pair", self.columns):
            return [_Texts(text, None) for text in texts]
        pair_column = required_column(table, "text_pair", (*expected, "text_pair"), self.columns)
        return [_Texts(*pair) for pair in zip(texts, text_cells(table, pair_column), strict=True)]

    def tokenize(self, rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[EncodedRow]:
        """The tokens of each row; what is too long is tokenized again with the tokenizer's own way to cut."""
        whole = self._call([row.values for row in rows], tokenizer, cut=False)
        lengths = [len(ids) for ids, _ in whole]
        long = [index for index, length in enumerate(lengths) if length > self.max_length]
        if long:
            short = self._call([rows[index].values for index in long], tokenizer, cut=True)
            for index, row in zip(long, short, strict=True):
                whole[index] = row
        for (ids, types), length in zip(whole, lengths, strict=True):
            yield EncodedRow(ids, length, token_types=types)

    def _call(
        self, texts: Sequence[_Texts], tokenizer: Tokenizer, cut: bool
    ) -> list[tuple[list[int], list[int] | None]]:
        paired = texts[0].pair is not None
        special = tokenizer.num_special_tokens_to_add(pair=paired)
        if cut and self.max_length <= special + paired:
            raise UserError(f"max_length={self.max_length} leaves no room for text beside {special} special tokens.")
        typed = paired and "token_type_ids" in tokenizer.model_input_names
        encoded = tokenizer(
            [row.text for row in texts],
            [row.pair for row in texts] if paired else None,
            truncation=cut,
            max_length=self.max_length if cut else None,
            return_token_type_ids=typed,
            return_attention_mask=False,
            verbose=False,
        )
        types = encoded["token_type_ids"] if typed else [None] * len(texts)
        return list(zip(encoded["input_ids"], types, strict=True))
