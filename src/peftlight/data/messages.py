"""Conversations in the tokenizer's chat template: the loss is on the assistant's turns alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftlight.data.cells import filled_cells, required_column, shown
from peftlight.data.chat import Message, assistant_spans, prompt_of
from peftlight.data.encoder import Purpose, Row
from peftlight.data.module import TextData
from peftlight.data.render import CausalEncoder, Segment
from peftlight.data.table import Table
from peftlight.data.tokenizer import Tokenizer
from peftlight.errors import UserError

_SHAPE = 'expected a list like [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'


@dataclass(eq=False, kw_only=True)
class Messages(TextData):
    """Rows of messages with role and content; a chat model learns to write the assistant's turns."""

    column_names: ClassVar[tuple[str, ...]] = ("messages",)
    made_for: ClassVar[str] = "CausalLM"

    max_length: int = 2048
    """Longer conversations are cut to this many tokens."""

    def encoder(self, purpose: Purpose, label_names: Sequence[str] | None) -> "MessageEncoder":
        """How rows become tokens."""
        return MessageEncoder(columns=self.columns, max_length=self.max_length, purpose=purpose)


@dataclass(frozen=True, kw_only=True)
class MessageEncoder(CausalEncoder):
    """The rendered conversation, its assistant turns trained up to and with the token that ends a turn."""

    adds_eos: ClassVar[bool] = False

    def rows(self, table: Table) -> list[list[Message]]:
        """The conversations."""
        column = required_column(table, "messages", ["messages"], self.columns)
        return [_conversation(cell, table, index) for index, cell in enumerate(filled_cells(table, column))]

    def render(self, row: Row, tokenizer: Tokenizer) -> list[Segment]:
        """The conversation, split at the borders of the assistant's turns."""
        if self.purpose == "predict":
            return [Segment(prompt_of(row.values, tokenizer, row.where), False)]
        text, spans = assistant_spans(row.values, tokenizer, row.where)
        segments: list[Segment] = []
        done = 0
        for start, end in spans:
            segments += [Segment(text[done:start], False), Segment(text[start:end], True)]
            done = end
        return [*segments, Segment(text[done:], False)]


def _conversation(cell: object, table: Table, index: int) -> list[Message]:
    if not isinstance(cell, list) or not cell:
        raise UserError(f"{table.where(index)}: 'messages' is {shown(cell)}; {_SHAPE}.")
    for turn, message in enumerate(cell, start=1):
        if not isinstance(message, dict):
            raise UserError(f"{table.where(index)}: message {turn} is {shown(message)}; {_SHAPE}.")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                problem = f"message {turn} has the {key} {shown(message.get(key))}; expected a text"
                raise UserError(f"{table.where(index)}: {problem}.")
    # A table with other columns in its messages holds null where a message lacks them; templates expect no key.
    return [{key: value for key, value in message.items() if value is not None} for message in cell]
