"""Plain text: every token is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from peftlight.data.cells import required_column, text_cells
from peftlight.data.encoder import Purpose, Row
from peftlight.data.module import TextData
from peftlight.data.render import CausalEncoder, Segment
from peftlight.data.table import Table
from peftlight.data.tokenizer import Tokenizer


@dataclass(eq=False, kw_only=True)
class PlainText(TextData):
    """Rows of text that a language model learns to write from the first token to the end-of-text token."""

    column_names: ClassVar[tuple[str, ...]] = ("text",)
    made_for: ClassVar[str] = "CausalLM"

    max_length: int = 512
    """Longer rows are cut to this many tokens."""

    def encoder(self, purpose: Purpose, label_names: Sequence[str] | None) -> "PlainTextEncoder":
        """How rows become tokens."""
        return PlainTextEncoder(columns=self.columns, max_length=self.max_length, purpose=purpose)


@dataclass(eq=False, kw_only=True)
class EnglishQuotes(PlainText):
    """2,508 quotes of well-known people in English."""

    source: str = "Abirate/english_quotes"
    columns: dict[str, str] = field(default_factory=lambda: {"text": "quote"})
    max_length: int = 128


@dataclass(frozen=True, kw_only=True)
class PlainTextEncoder(CausalEncoder):
    """The text and the end of text, all trained; for "predict" the text as it is, to be continued."""

    def rows(self, table: Table) -> list[str]:
        """The texts."""
        return text_cells(table, required_column(table, "text", ["text"], self.columns))

    def render(self, row: Row, tokenizer: Tokenizer) -> list[Segment]:
        """The text."""
        return [Segment(row.values, True)]
