"""Texts, or pairs of texts, with a class each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from peftlight.data.cells import column_of, required_column, text_cells
from peftlight.data.encoder import Encoder, Purpose, Row
from peftlight.data.framing import Texts, framed
from peftlight.data.labels import chosen_names, labels_of, unlabelled
from peftlight.data.module import TextData
from peftlight.data.table import Table
from peftlight.data.tokenizer import Tokenizer
from peftlight.data.tokens import EncodedRow, Tokens

_EXPECTED = ("text", "label")


@dataclass(eq=False, kw_only=True)
class TextClassification(TextData):
    """Rows of a text (or text and text_pair) and a label, which is a number counted from 0 or a name."""

    column_names: ClassVar[tuple[str, ...]] = ("text", "label", "text_pair")
    made_for: ClassVar[str] = "SequenceClassification"

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
        return chosen_names(self.labels, train)


@dataclass(eq=False, kw_only=True)
class SST2(TextClassification):
    """Stanford Sentiment Treebank, two classes: 67,349 phrases of film reviews, with 872 sentences to validate on."""

    source: str = "stanfordnlp/sst2"
    columns: dict[str, str] = field(default_factory=lambda: {"text": "sentence"})
    labels: list[str] | None = field(default_factory=lambda: ["negative", "positive"])
    max_length: int = 128


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
        labels, names, findings = labels_of(tables, _EXPECTED, self.columns, self.names)
        tokens = super().encode(tables, tokenizer)
        return replace(tokens, labels=labels, label_names=names, findings=findings)

    def unlabelled(self, tables: Sequence[Table]) -> str:
        """Why there are no labels; empty if there are."""
        return unlabelled(tables, _EXPECTED, self.columns, self.names)

    def rows(self, table: Table) -> list[Texts]:
        """The text or texts of each row."""
        expected = ("text",) if self.purpose == "predict" else _EXPECTED
        texts = text_cells(table, required_column(table, "text", expected, self.columns))
        if "text_pair" not in self.columns and not column_of(table, "text_pair", self.columns):
            return [Texts(text) for text in texts]
        pair_column = required_column(table, "text_pair", (*expected, "text_pair"), self.columns)
        return [Texts(*pair) for pair in zip(texts, text_cells(table, pair_column), strict=True)]

    def tokenize(self, rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[EncodedRow]:
        """The tokens of each row."""
        for row in framed([row.values for row in rows], tokenizer, self.max_length):
            yield EncodedRow(row.ids, row.length, token_types=row.types)
