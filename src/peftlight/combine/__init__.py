"""One adapter of several on the same base: Σ wᵢ ΔWᵢ and its relatives, as an ordinary LoRA."""

from peftlight.combine.combination import Combination, combine

__all__ = ["Combination", "combine"]
