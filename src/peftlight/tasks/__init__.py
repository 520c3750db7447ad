"""The LightningModules: a pretrained model paired with a strategy, one file for each task."""

from peftlight.tasks.base import PEFTModule
from peftlight.tasks.causal_lm import CausalLM
from peftlight.tasks.schedule import LinearWarmup
from peftlight.tasks.sequence_classification import SequenceClassification

__all__ = ["CausalLM", "LinearWarmup", "PEFTModule", "SequenceClassification"]
