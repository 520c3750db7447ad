"""The LightningModules: a pretrained model paired with a strategy, one file for each task."""

from peftlight.tasks.base import PEFTModule
from peftlight.tasks.causal_lm import CausalLM
from peftlight.tasks.image_classification import ImageClassification
from peftlight.tasks.muon import MuonAndAdamW
from peftlight.tasks.schedule import LinearWarmup
from peftlight.tasks.seq2seq import Seq2Seq
from peftlight.tasks.sequence_classification import SequenceClassification
from peftlight.tasks.task_callback import TaskCallback
from peftlight.tasks.token_classification import TokenClassification

__all__ = [
    "CausalLM",
    "ImageClassification",
    "LinearWarmup",
    "MuonAndAdamW",
    "PEFTModule",
    "Seq2Seq",
    "SequenceClassification",
    "TaskCallback",
    "TokenClassification",
]
