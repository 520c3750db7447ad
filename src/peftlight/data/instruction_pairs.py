"""Instructions for encoder-decoders: the filled-in prompt is the source, the answer is the target."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from peftlight.data.encoder import Purpose, Row
from peftlight.data.instructions import InstructionRows, Instructions
from peftlight.data.source_target import SourceTarget, SourceTargetEncoder


@dataclass(eq=False, kw_only=True)
class InstructionPairs(Instructions, SourceTarget):
    """Rows of instruction, input (may be absent or empty) and output, such as Alpaca's, for an encoder-decoder."""

    least: ClassVar[dict[str, int]] = SourceTarget.least
    made_for: ClassVar[str] = SourceTarget.made_for

    max_length: int = 512
    """Longer prompts are cut to this many tokens."""

    def encoder(self, purpose: Purpose, label_names: Sequence[str] | None) -> "InstructionPairEncoder":
        """How rows become tokens."""
        return InstructionPairEncoder(
            columns=self.columns,
            max_length=self.max_length,
            purpose=purpose,
            max_target_length=self.max_target_length,
            prefix=self.prefix,
            template=self.template,
            template_without_input=self.template_without_input,
        )


@dataclass(frozen=True, kw_only=True)
class InstructionPairEncoder(InstructionRows, SourceTargetEncoder):
    """Prompt and answer apart."""

    def pair(self, row: Row) -> tuple[str, str]:
        """The filled-in prompt, and the answer."""
        return self.prompt(row), row.values.output
