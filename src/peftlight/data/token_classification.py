"""Words with a tag each."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from peftlight.data.cells import filled_cells, required_column, shown
from peftlight.data.encoder import Encoder, Purpose, Row
from peftlight.data.framing import Texts, framed
from peftlight.data.labels import chosen_names, labels_of, unlabelled
from peftlight.data.module import TextData
from peftlight.data.table import Table
from peftlight.data.tokenizer import Tokenizer
from peftlight.data.tokens import IGNORED, EncodedRow, Tokens
from peftlight.errors import UserError

_EXPECTED = ("tokens", "tags")


@dataclass(eq=False, kw_only=True)
class TaggedWords(TextData):
    """Rows of tokens, a list of words, and of tags, a name or a number counted from 0 for each word.

    The first piece of a word carries its label. Files may also be in CoNLL's format: a word and its tag on each line,
    a blank line after each sentence.
    """

    column_names: ClassVar[tuple[str, ...]] = _EXPECTED
    made_for: ClassVar[str] = "TokenClassification"

    max_length: int = 256
    """Longer rows are cut to this many tokens; the words beyond are neither trained nor scored."""
    labels: list[str] | None = None
    """The names of the tags in order; without it they are those found in the training split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._to_predict: list[list[str]] | None = None

    def encoder(self, purpose: Purpose, label_names: Sequence[str] | None) -> "WordEncoder":
        """How rows become tokens."""
        names = None if label_names is None or purpose == "predict" else tuple(label_names)
        return WordEncoder(columns=self.columns, max_length=self.max_length, purpose=purpose, names=names)

    def find_label_names(self, train: Callable[[], Tokens]) -> list[str] | None:
        """The tags in order; `train` gives the training split where they have to be found."""
        return chosen_names(self.labels, train)

    def setup(self, stage: str | None = None) -> None:
        """Load the stage's splits from the cache."""
        super().setup(stage)
        self._to_predict = None

    def words_of(self, row: int) -> list[str]:
        """The words of a row to predict, also those that were cut off."""
        if self._to_predict is None:
            tables, encoder = self._ready().serving("predict").read(), self.encoder("predict", None)
            self._to_predict = [words for table in tables for words in encoder.rows(table)]
        return self._to_predict[row]


@dataclass(eq=False, kw_only=True)
class CoNLL2003(TaggedWords):
    """CoNLL-2003, names in English news: 14,041 sentences, with 3,250 to validate on and 3,453 to test on."""

    source: str = "lhoestq/conll2003"
    columns: dict[str, str] = field(default_factory=lambda: {"tags": "ner_tags"})
    labels: list[str] | None = field(
        default_factory=lambda: ["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
    )
    max_length: int = 128


@dataclass(frozen=True, kw_only=True)
class WordEncoder(Encoder):
    """Words with a space between them, as the tokenizer frames such a text; where each begins follows from its place.

    So every tokenizer meets words as in running text, also those that write the space before a word into its first
    piece. A word has no piece of its own where the tokenizer drops it, or joins it to the word before.
    """

    names: tuple[str, ...] | None
    """The tags in order; None where they are to be found in the rows."""

    def encode(self, tables: Sequence[Table], tokenizer: Tokenizer) -> Tokens:
        """The tokens of all rows, with the tags of their words; for "predict" with the words' numbers."""
        if self.purpose == "predict" or (self.purpose == "test" and self.unlabelled(tables)):
            return super().encode(tables, tokenizer)
        words = [self._words(table) for table in tables]
        tags, names, findings = labels_of(words, ["label"], self._as_label(), self.names, of_words=True)
        tokens = super().encode(tables, tokenizer)
        counts = [count for part in words for count in part.counts]
        return replace(tokens, tags=_per_token(tags, counts, tokens), words=None, label_names=names, findings=findings)

    def unlabelled(self, tables: Sequence[Table]) -> str:
        """Why there are no tags; empty if there are."""
        reason = self.without_column(tables, "tags")
        return reason or unlabelled(list(map(self._words, tables)), ["label"], self._as_label(), self.names)

    def _as_label(self) -> dict[str, str]:
        """The column of the tags under the name that labels have."""
        return {"label": self.columns.get("tags", "tags")}

    def rows(self, table: Table) -> list[list[str]]:
        """The words of each row."""
        expected = ("tokens",) if self.purpose == "predict" else _EXPECTED
        column = required_column(table, "tokens", expected, self.columns)
        rows: list[list[str]] = []
        for index, words in enumerate(_lists(table, column)):
            for place, word in enumerate(words, start=1):
                if not isinstance(word, str) or not word.strip():
                    problem = f"word {place} of {column!r} is {shown(word)}; expected a text that is not empty"
                    raise UserError(f"{table.where(index)}: {problem}.")
            rows.append([str(word) for word in words])
        return rows

    def _words(self, table: Table) -> "_Words":
        """Each tag of the table as a row of its own, after a look whether every word has one."""
        column = required_column(table, "tags", _EXPECTED, self.columns)
        tags = _lists(table, column)
        for index, (words, theirs) in enumerate(zip(self.rows(table), tags, strict=True)):
            if len(words) != len(theirs):
                problem = f"{len(words)} words, but {len(theirs)} tags in {column!r}"
                raise UserError(f"{table.where(index)}: {problem}. Every word needs one tag.")
        counts = [len(row) for row in tags]
        if not sum(counts):
            raise UserError(f"{table.name} has no words: every list is empty.")
        cells: list[object] = [tag for row in tags for tag in row]
        numbers = np.repeat(np.asarray(table.numbers), counts).tolist()
        return _Words(table.name, table.unit, [column], numbers, lambda _: cells, table.class_names, counts=counts)

    def tokenize(self, rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[EncodedRow]:
        """The tokens of each row, and which of them begin a word."""
        texts = [Texts(" ".join(row.values)) for row in rows]
        for row, made in zip(rows, framed(texts, tokenizer, self.max_length, spans=True), strict=True):
            yield EncodedRow(made.ids, made.length, words=first_pieces(row.values, made.spans))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Words(Table):
    """The words of a table as rows of one column."""

    counts: list[int]
    """How many words each row of that table has."""

    def where(self, index: int) -> str:
        """File, row and word."""
        ends = np.cumsum(self.counts)
        row = int(np.searchsorted(ends, index, side="right"))
        return f"{super().where(index)}, word {index - int(ends[row]) + self.counts[row] + 1}"


def _lists(table: Table, column: str) -> list[list[object]]:
    lists: list[list[object]] = []
    for index, cell in enumerate(filled_cells(table, column)):
        if not isinstance(cell, list):
            problem = f"{column!r} is {shown(cell)}; expected a list with one entry for each word"
            raise UserError(f"{table.where(index)}: {problem}.")
        lists.append(cell)
    return lists


def first_pieces(words: Sequence[str], spans: Sequence[tuple[int, int]]) -> NDArray[np.int32]:
    """Per token: the number of the word that begins with it, or -100.

    `spans` are the tokens' characters in the words joined by spaces; a token belongs to the first word of which it
    holds a character, and to none if it holds no more than a space, or nothing as special tokens do.
    """
    lengths = np.asarray([len(word) for word in words], np.int64)
    ends = np.cumsum(lengths + 1) - 1
    starts = np.append(ends - lengths, np.iinfo(np.int64).max)  # the last for tokens after all words
    first, last = np.asarray(spans, np.int64).reshape(-1, 2).T
    word = np.searchsorted(ends, first, side="right")
    numbers, places = np.unique(np.where(starts[word] < last, word, IGNORED), return_index=True)
    marks = np.full(len(first), IGNORED, np.int32)
    marks[places] = numbers
    return marks


def _per_token(tags: NDArray[np.int32], counts: Sequence[int], tokens: Tokens) -> NDArray[np.int32]:
    """The tag of the word that begins with each token; `tags` has those of all words, `counts` how many a row has."""
    assert tokens.words is not None
    first_word = np.cumsum(counts) - counts
    row = np.repeat(np.arange(len(tokens)), np.diff(tokens.offsets))
    begins = tokens.words != IGNORED
    found = np.full(len(row), IGNORED, np.int32)
    found[begins] = tags[(first_word[row] + tokens.words)[begins]]
    return found
