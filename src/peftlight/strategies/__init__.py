"""Every strategy, one file each."""

from peftlight.strategies.adalora import AdaLoRA
from peftlight.strategies.bitfit import BitFit
from peftlight.strategies.bottleneck import BottleneckAdapter
from peftlight.strategies.compacter import Compacter
from peftlight.strategies.full import Full
from peftlight.strategies.hyperlora import HyperLoRA
from peftlight.strategies.ia3 import IA3
from peftlight.strategies.layer_norm import LayerNormTuning
from peftlight.strategies.lora import LoRA
from peftlight.strategies.p_tuning import PTuning
from peftlight.strategies.prefix import PrefixTuning
from peftlight.strategies.prompt import PromptTuning
from peftlight.strategies.stack import Stack
from peftlight.strategies.trainable_tokens import TrainableTokens
from peftlight.strategies.vera import VeRA

__all__ = [
    "IA3",
    "AdaLoRA",
    "BitFit",
    "BottleneckAdapter",
    "Compacter",
    "Full",
    "HyperLoRA",
    "LayerNormTuning",
    "LoRA",
    "PTuning",
    "PrefixTuning",
    "PromptTuning",
    "Stack",
    "TrainableTokens",
    "VeRA",
]
