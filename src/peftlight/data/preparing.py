"""The data sets that a stage of the Trainer needs: splits, tokens through the cache, and checks on them."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peftlight.data.cache import cached, token_file
from peftlight.data.encoder import Purpose
from peftlight.data.sources import Split
from peftlight.data.summary import Summary, summarize
from peftlight.data.tokenizer import Tokenizer, identity
from peftlight.data.tokens import TokenDataset, Tokens
from peftlight.errors import UserError
from peftlight.files import cache_folder

if TYPE_CHECKING:
    from peftlight.data.module import TextData

ROLES: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "validation", "test", "predict"),
}
"""What each stage of the Trainer reads; None is all of them."""


class Preparation:
    """The data sets of one stage by role, and an account of what went into them."""

    def __init__(self, data: "TextData", splits: Mapping[str, Split], tokenizer: Tokenizer, stage: str | None) -> None:
        self.data = data
        self.splits = splits
        self.tokenizer = tokenizer
        self.datasets: dict[str, TokenDataset] = {}
        self.summaries: dict[str, Summary] = {}
        self.notices: list[str] = []
        self._identity = identity(tokenizer)
        self._folder = cache_folder(data.cache_dir)
        self._tokens_of: dict[tuple[str, Purpose], Tokens] = {}
        self._digests: dict[str, str] = {}
        self._used: list[str] = []
        self.label_names: list[str] | None = None
        self.label_names = data.find_label_names(self._train_tokens)
        for role in ROLES[stage]:
            self._add(role)
        self.fingerprint = hashlib.sha256("\n".join(sorted(self._used)).encode()).hexdigest()

    def _add(self, role: str) -> None:
        split = self._split_for(role)
        if split is None:
            return
        purpose: Purpose = "test" if role == "test" else "predict" if role == "predict" else "train"
        tokens = self._tokens(split, purpose)
        if tokens.unlabelled:
            split = self._instead_of(tokens)
            tokens = self._tokens(split, "train")
        rows = self._rows(split, len(tokens))
        summary = summarize(tokens, rows, self.data.max_length, lambda row: self._place(split, tokens, row))
        if not summary.kept:
            raise UserError(f"The {role} split has no row to use: {summary}.")
        self.summaries[role] = summary
        self.datasets[role] = TokenDataset(tokens, rows[tokens.kept()[rows]])
        self._used.append(f"{role} {self._digest(split)} {self._share(split)}")

    def _split_for(self, role: str) -> str | None:
        """The split that a role reads; "aside" is the part of the training rows set aside for validation."""
        if role == "predict" and "predict" not in self.splits:
            return "test" if "test" in self.splits else self._split_for("validation")
        if role == "validation" and role not in self.splits:
            return "aside" if "train" in self.splits else None
        return role if role in self.splits else None

    def _instead_of(self, unlabelled: Tokens) -> str:
        split = self._split_for("validation")
        if split is None:
            raise UserError(f"There is nothing to test on: {unlabelled.unlabelled}.")
        self.notices.append(
            f"The test split has no labels, so test uses the validation split: {unlabelled.unlabelled}."
        )
        return split

    def _train_tokens(self) -> Tokens:
        if "train" not in self.splits:
            raise UserError("There is no training split to find the labels in. Name them in order: labels: [..., ...]")
        return self._tokens("train", "train")

    def _tokens(self, split: str, purpose: Purpose) -> Tokens:
        name = "train" if split == "aside" else split
        if (name, purpose) not in self._tokens_of:
            self._tokens_of[name, purpose] = self._through_cache(name, purpose)
        return self._tokens_of[name, purpose]

    def _through_cache(self, name: str, purpose: Purpose) -> Tokens:
        encoder = self.data.encoder(purpose, self.label_names)
        path = token_file(self._folder, self._digest(name), self._identity, encoder.settings())
        tokens = cached(
            path,
            make=lambda: encoder.encode(self.splits[name].read(), self.tokenizer),
            describe=lambda made: asdict(self._whole(name, made)),
        )
        if purpose != "predict" and not tokens.unlabelled:
            self._check(name, self._whole(name, tokens))
        return tokens

    def _whole(self, name: str, tokens: Tokens) -> Summary:
        rows = np.arange(len(tokens))
        return summarize(tokens, rows, self.data.max_length, lambda row: self._place(name, tokens, row))

    def _check(self, name: str, summary: Summary) -> None:
        where = ", ".join(part.name for part in self.splits[name].parts)
        limit = self.data.max_length
        if summary.truncated == summary.rows:
            longest = f"the longest has {summary.longest} tokens"
            raise UserError(f"{where}: every row is longer than max_length={limit}; {longest}. Raise max_length.")
        if summary.empty > self.data.max_empty * summary.rows:
            count = f"{summary.empty} of {summary.rows} rows have nothing to learn from within max_length={limit}"
            fix = f"Raise max_length (the longest row has {summary.longest} tokens), fill in their answers, or raise"
            share = f"max_empty={self.data.max_empty}"
            raise UserError(f"{where}: {count}, more than {share} allows: {summary.named()}. {fix} max_empty.")

    def _rows(self, split: str, count: int) -> NDArray[np.int64]:
        if not self._share(split):
            return np.arange(count)
        size = _rows_aside(self.data.validation_size, count)
        # A generator of its own: the same rows whatever else has drawn random numbers.
        order = np.random.default_rng(self.data.split_seed).permutation(count)
        return np.sort(order[:size] if split == "aside" else order[size:])

    def _share(self, split: str) -> str:
        """Which part of the rows a split is, when it is not all of them."""
        if split not in ("train", "aside") or "validation" in self.splits:
            return ""
        return f"{split} {self.data.validation_size} {self.data.split_seed}"

    def _digest(self, split: str) -> str:
        name = "train" if split == "aside" else split
        if name not in self._digests:
            self._digests[name] = self.splits[name].digest()
        return self._digests[name]

    def _place(self, split: str, tokens: Tokens, row: int) -> str:
        parts = self.splits["train" if split == "aside" else split].parts
        part = parts[tokens.files[row]]
        return (f"{part.name}, " if len(parts) > 1 else "") + f"{part.unit} {tokens.numbers[row]}"


def _rows_aside(size: int | float, count: int) -> int:
    rows = size if isinstance(size, int) else max(1, round(size * count))
    if not 0 < rows < count:
        raise UserError(f"validation_size={size} leaves no rows to train on: there are {count}. Give fewer, or a file.")
    return rows
