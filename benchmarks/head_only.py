"""The baseline that every method has to beat: a frozen model with a trained head."""

from dataclasses import dataclass

from peftlight import PEFTStrategy


@dataclass
class HeadOnly(PEFTStrategy):
    """Train nothing beside the new head, which the task trains anyway."""
