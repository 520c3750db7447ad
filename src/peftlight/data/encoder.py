"""What every family of data does to turn rows into tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

from peftlight.data.bar import with_bar
from peftlight.data.cells import without_column
from peftlight.data.table import Table
from peftlight.data.tokenizer import Tokenizer
from peftlight.data.tokens import EncodedRow, TokenBuilder, Tokens

Purpose = Literal["train", "test", "predict"]
"""Train: every row needs its answer. Test: they may all be absent. Predict: rows without their answers."""

_BATCH = 1000


class Row(NamedTuple):
    """One row's values, and where it stands."""

    values: Any
    table: Table
    position: int

    @property
    def where(self) -> str:
        """As an error message begins."""
        return self.table.where(self.position)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns the rows of a split into tokens; beside rows and tokenizer the result depends on its fields alone."""

    left_padded: ClassVar[bool] = False

    columns: dict[str, str]
    """Our name of a column to the file's."""
    max_length: int
    """Rows are cut to this many tokens."""
    purpose: Purpose
    """What the tokens are for."""

    def settings(self) -> dict[str, Any]:
        """The fields, for the cache's key."""
        return {"encoder": type(self).__name__, **asdict(self)}

    def encode(self, tables: Sequence[Table], tokenizer: Tokenizer) -> Tokens:
        """The tokens of all rows."""
        reason = self.unlabelled(tables) if self.purpose == "test" else ""
        if reason:
            return replace(replace(self, purpose="predict").encode(tables, tokenizer), unlabelled=reason)
        rows = [Row(values, table, index) for table in tables for index, values in enumerate(self.rows(table))]
        builder = TokenBuilder()
        batches = [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]
        for batch in with_bar(batches, len(rows), f"Tokenizing {tables[0].name}"):
            for encoded in self.tokenize(batch, tokenizer):
                builder.add(encoded)
        numbers = [number for table in tables for number in table.numbers]
        return builder.tokens(numbers, [file for file, table in enumerate(tables) for _ in range(len(table))])

    def unlabelled(self, tables: Sequence[Table]) -> str:
        """Why the rows have no answers to test against; empty if they have."""
        return ""

    def without_column(self, tables: Sequence[Table], ours: str) -> str:
        """The reason of `unlabelled` when a table has no such column."""
        return without_column(tables, ours, self.columns)

    def rows(self, table: Table) -> Sequence[Any]:
        """What `tokenize` needs of each row, checked."""
        raise NotImplementedError

    def tokenize(self, rows: Sequence[Row], tokenizer: Tokenizer) -> Iterable[EncodedRow]:
        """The tokens of each of some rows."""
        raise NotImplementedError
