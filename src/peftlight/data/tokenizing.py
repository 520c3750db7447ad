"""The data sets of a stage as tokens: through the cache, and checked for what was cut or has no labels."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peftlight.data.cache import cached, token_file
from peftlight.data.encoder import Encoder, Purpose
from peftlight.data.preparing import Preparation
from peftlight.data.sources import Split
from peftlight.data.summary import Summary, summarize
from peftlight.data.tokenizer import Tokenizer, identity
from peftlight.data.tokens import TokenDataset, Tokens
from peftlight.errors import UserError
from peftlight.files import cache_folder

if TYPE_CHECKING:
    from peftlight.data.module import TextData


class TextPreparation(Preparation[Tokens]):
    """The tokenized data sets of one stage."""

    data: "TextData"

    def __init__(self, data: "TextData", splits: Mapping[str, Split], tokenizer: Tokenizer, stage: str | None) -> None:
        self.tokenizer = tokenizer
        self._identity = identity(tokenizer)
        self._folder = cache_folder(data.cache_dir)
        super().__init__(data, splits, stage)

    def read(self, name: str, purpose: Purpose) -> Tokens:
        """The tokens of all rows."""
        encoder = self.data.encoder(purpose, self.label_names)
        # The same bytes are other rows in a file of another kind.
        endings = [PurePath(part.name).suffix for part in self.splits[name].parts]
        content = " ".join([self.digest(name), *endings, repr(self.data.layout)])
        path = token_file(self._folder, content, self._identity, encoder.settings())
        tokens = cached(
            path,
            make=lambda: self._encoded(name, encoder),
            describe=lambda made: asdict(self._whole(name, made)),
        )
        if purpose != "predict" and not tokens.unlabelled:
            self._check(name, self._whole(name, tokens))
        return tokens

    def _encoded(self, name: str, encoder: Encoder) -> Tokens:
        tables = self.splits[name].read()
        tokens = encoder.encode(tables, self.tokenizer)
        return replace(tokens, findings=[*(notice for table in tables for notice in table.notices), *tokens.findings])

    def summarize(self, name: str, content: Tokens, rows: NDArray[np.int64]) -> Summary:
        """Counts of rows and tokens."""
        parts = self.splits[name].parts
        short, whole = (lambda row: self._place(name, content, row)), (lambda row: content.where(row, parts))
        return summarize(content, rows, self.data.max_length, short, whole)

    def dataset(self, role: str, content: Tokens, rows: NDArray[np.int64]) -> TokenDataset:
        """Some rows of tokens."""
        return TokenDataset(content, rows)

    def _whole(self, name: str, tokens: Tokens) -> Summary:
        return self.summarize(name, tokens, np.arange(len(tokens)))

    def _check(self, name: str, summary: Summary) -> None:
        where = ", ".join(part.name for part in self.splits[name].parts)
        limit = self.data.max_length
        if summary.truncated == summary.rows:
            longest = f"the longest has {summary.longest} tokens"
            raise UserError(f"{where}: every row is longer than max_length={limit}; {longest}. Raise max_length.")
        if summary.truncated_targets == summary.rows:
            longest = f"the longest has {summary.longest_target} tokens"
            raise UserError(f"{where}: every target is cut; {longest}. Raise max_target_length.")
        if summary.empty > self.data.max_empty * summary.rows:
            count = f"{summary.empty} of {summary.rows} rows have nothing to learn from within max_length={limit}"
            fix = f"Raise max_length (the longest row has {summary.longest} tokens), fill in their answers, or raise"
            share = f"max_empty={self.data.max_empty}"
            raise UserError(f"{where}: {count}, more than {share} allows: {summary.named()}. {fix} max_empty.")

    def _place(self, name: str, tokens: Tokens, row: int) -> str:
        parts = self.splits[name].parts
        part = parts[tokens.files[row]]
        return (f"{part.name}, " if len(parts) > 1 else "") + f"{part.unit} {tokens.numbers[row]}"
