"""LightningDataModules for text and images: read, checked, rendered, masked, tokenized once, batched."""

from peftlight.data.classification import SST2, TextClassification
from peftlight.data.family import DataFamily
from peftlight.data.images import Images
from peftlight.data.instruction_pairs import InstructionPairs
from peftlight.data.instructions import Alpaca, Instructions
from peftlight.data.messages import Messages
from peftlight.data.module import TextData
from peftlight.data.plain_text import EnglishQuotes, PlainText
from peftlight.data.source_target import SourceTarget
from peftlight.data.summary import Summary
from peftlight.data.token_classification import CoNLL2003, TaggedWords

__all__ = [
    "SST2",
    "Alpaca",
    "CoNLL2003",
    "DataFamily",
    "EnglishQuotes",
    "Images",
    "InstructionPairs",
    "Instructions",
    "Messages",
    "PlainText",
    "SourceTarget",
    "Summary",
    "TaggedWords",
    "TextClassification",
    "TextData",
]
