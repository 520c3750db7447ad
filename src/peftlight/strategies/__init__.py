"""Every strategy, one file each."""

from peftlight.strategies.bitfit import BitFit
from peftlight.strategies.full import Full
from peftlight.strategies.lora import LoRA

__all__ = ["BitFit", "Full", "LoRA"]
