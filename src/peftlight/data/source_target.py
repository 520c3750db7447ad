"""Sources with their targets, for encoder-decoders: the encoder reads the source, the decoder learns the target."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftlight.data.cells import required_column, text_cells
from peftlight.data.encoder import Encoder, Purpose, Row
from peftlight.data.framing import Texts, framed
from peftlight.data.module import TextData
from peftlight.data.table import Table
from peftlight.data.tokenizer import Tokenizer, eos_id
from peftlight.data.tokens import EncodedRow


@dataclass(eq=False, kw_only=True)
class SourceTarget(TextData):
    """Rows of source and target, such as articles and their summaries; an encoder-decoder learns to write the target.

    Every target ends with the end-of-text token, also one that is cut.
    """

    column_names: ClassVar[tuple[str, ...]] = ("source", "target")
    least: ClassVar[dict[str, int]] = {**TextData.least, "max_target_length": 2}
    made_for: ClassVar[str] = "Seq2Seq"

    max_length: int = 512
    """Longer sources are cut to this many tokens."""
    max_target_length: int = 128
    """Longer targets are cut to this many tokens."""
    prefix: str = ""
    """Text before every source, such as "summarize: ", which T5 knows from its pretraining."""

    def encoder(self, purpose: Purpose, label_names: Sequence[str] | None) -> "SourceTargetEncoder":
        """How rows become tokens."""
        return SourceTargetEncoder(
            columns=self.columns,
            max_length=self.max_length,
            purpose=purpose,
            max_target_length=self.max_target_length,
            prefix=self.prefix,
        )


@dataclass(frozen=True, kw_only=True)
class SourceTargetEncoder(Encoder):
    """Source and target apart, each as the tokenizer frames it. An empty target leaves a row nothing to train."""

    max_target_length: int
    """Targets are cut to this many tokens."""
    prefix: str
    """Text before every source."""

    def rows(self, table: Table) -> Sequence[object]:
        """Source and target of each row."""
        expected = ["source"] + ["target"] * (self.purpose != "predict")
        sources, *targets = (
            text_cells(table, required_column(table, name, expected, self.columns), may_be_empty=name == "target")
            for name in expected
        )
        return list(zip(sources, *(targets or [[""] * len(table)]), strict=True))

    def unlabelled(self, tables: Sequence[Table]) -> str:
        """Why there are no targets; empty if there are."""
        return self.without_column(tables, "target")

    def pair(self, row: Row) -> tuple[str, str]:
        """The row's source, without the prefix, and its target; the latter is empty for "predict"."""
        source, target = row.values
        return source, target

    def tokenize(self, rows: Sequence[Row], tokenizer: Tokenizer) -> Iterator[EncodedRow]:
        """The tokens of each row's source and target."""
        pairs = [self.pair(row) for row in rows]
        sources = framed([Texts(self.prefix + source) for source, _ in pairs], tokenizer, self.max_length)
        if self.purpose == "predict":
            yield from (EncodedRow(source.ids, source.length) for source in sources)
            return
        targets = self._targets([target for _, target in pairs], tokenizer)
        for source, (target, length) in zip(sources, targets, strict=True):
            yield EncodedRow(source.ids, source.length, target=target, target_length=length)

    def _targets(self, texts: list[str], tokenizer: Tokenizer) -> Iterator[tuple[list[int], int]]:
        """The tokens of each target, and how many there were before the cut."""
        eos = eos_id(tokenizer)
        # T5 and BART end every text themselves; where a tokenizer does not, the last place is kept free.
        end = [] if eos in tokenizer(text_target="", verbose=False)["input_ids"] else [eos]
        rows = framed([Texts(text) for text in texts], tokenizer, self.max_target_length - len(end), target=True)
        for text, row in zip(texts, rows, strict=True):
            yield (row.ids + end, row.length + len(end)) if text.strip() else ([], 0)
