"""LightningDataModules for text: read, checked, rendered, masked, tokenized once, batched."""

from peftlight.data.classification import SST2, TextClassification
from peftlight.data.family import DataFamily
from peftlight.data.instructions import Alpaca, Instructions
from peftlight.data.messages import Messages
from peftlight.data.module import TextData
from peftlight.data.plain_text import EnglishQuotes, PlainText
from peftlight.data.summary import Summary

__all__ = [
    "SST2",
    "Alpaca",
    "DataFamily",
    "EnglishQuotes",
    "Instructions",
    "Messages",
    "PlainText",
    "Summary",
    "TextClassification",
    "TextData",
]
