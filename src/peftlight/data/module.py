"""The LightningDataModule of all text families: tokens, padding and their fields."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from peftlight.data.batching import Collator
from peftlight.data.encoder import Encoder, Purpose
from peftlight.data.family import DataFamily
from peftlight.data.tokenizer import load_tokenizer, pad_id
from peftlight.data.tokenizing import TextPreparation


@dataclass(eq=False, kw_only=True)
class TextData(DataFamily):
    """Text from a file, a folder or the hub, tokenized once and kept; a family of data says how rows become tokens."""

    least: ClassVar[dict[str, int]] = {"max_length": 2, **DataFamily.least, "max_empty": 0}

    tokenizer: Any = None
    """Name or folder of the tokenizer; by default that of the model."""
    pad_token: str | None = None
    """The padding token, for tokenizers that have none."""
    max_length: int = 512
    """Longer rows are cut to this many tokens."""
    max_empty: float = 0.05
    """The run stops if a larger share of rows than this has no label tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._given_tokenizer = self.tokenizer
        self._pad_id = 0

    @abstractmethod
    def encoder(self, purpose: Purpose, label_names: Sequence[str] | None) -> Encoder:
        """How rows become tokens: the one thing a family has to say."""

    def prepare(self, stage: str | None) -> TextPreparation:
        """The stage's splits as tokens."""
        tokenizer = load_tokenizer(self._given_tokenizer, self.trainer and self.trainer.lightning_module)
        pad_id(tokenizer, self.pad_token)
        return TextPreparation(self, self.find_splits(), tokenizer, stage)

    def setup(self, stage: str | None = None) -> None:
        """Load the stage's splits from the cache."""
        super().setup(stage)
        prepared = self._ready()
        assert isinstance(prepared, TextPreparation)
        self.tokenizer = prepared.tokenizer
        self._pad_id = pad_id(self.tokenizer, self.pad_token)

    def collator(self, role: str) -> Collator:
        """Pads rows to the longest of the batch."""
        return Collator(self._pad_id, left=role == "predict" and self.encoder("predict", None).left_padded)
