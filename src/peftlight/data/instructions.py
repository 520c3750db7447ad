"""Instructions with their answers: the loss is on the answers alone."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from peftlight.data.cells import column_of, required_column, text_cells
from peftlight.data.encoder import Encoder, Purpose, Row
from peftlight.data.module import TextData
from peftlight.data.render import CausalEncoder, Segment
from peftlight.data.table import Table
from peftlight.data.tokenizer import Tokenizer
from peftlight.errors import UserError

_NAMES = ("instruction", "input", "output")
_PLACES = re.compile(r"\{(instruction|input|output)\}")

WITH_INPUT = """\
Below is an instruction for a task, with an input that it is about. Write a response that does what it asks.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""

WITHOUT_INPUT = """\
Below is an instruction for a task. Write a response that does what it asks.

### Instruction:
{instruction}

### Response:
"""


@dataclass(eq=False, kw_only=True)
class Instructions(TextData):
    """Rows of instruction, input (may be absent or empty) and output; a language model learns to write the output."""

    column_names: ClassVar[tuple[str, ...]] = _NAMES
    made_for: ClassVar[str] = "CausalLM"

    max_length: int = 1024
    """Longer rows are cut to this many tokens."""
    template: str = WITH_INPUT
    """The prompt of rows with an input: {instruction} and {input} are filled in, the answer follows."""
    template_without_input: str = WITHOUT_INPUT
    """The prompt of rows whose input is empty: {instruction} is filled in, the answer follows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_places("template", self.template, {"instruction", "input"})
        _check_places("template_without_input", self.template_without_input, {"instruction"})

    def encoder(self, purpose: Purpose, label_names: Sequence[str] | None) -> Encoder:
        """How rows become tokens."""
        return InstructionEncoder(
            columns=self.columns,
            max_length=self.max_length,
            purpose=purpose,
            template=self.template,
            template_without_input=self.template_without_input,
        )


@dataclass(eq=False, kw_only=True)
class Alpaca(Instructions):
    """Stanford Alpaca: 52,002 instructions written by a language model."""

    source: str = "tatsu-lab/alpaca"


def _check_places(field: str, template: str, expected: set[str]) -> None:
    found = set(_PLACES.findall(template))
    if found != expected:
        needs = " and ".join("{" + name + "}" for name in sorted(expected, reverse=True))
        has = ", ".join("{" + name + "}" for name in sorted(found)) or "none"
        raise UserError(
            f"{field} must hold {needs} and no other place (the answer follows the template); found: {has}."
        )


class _Exchange(NamedTuple):
    instruction: str
    input: str
    output: str


@dataclass(frozen=True, kw_only=True)
class InstructionRows(Encoder):
    """What rows of instructions hold, and the prompt that they make."""

    template: str
    """The prompt of rows with an input."""
    template_without_input: str
    """The prompt of rows without."""

    def rows(self, table: Table) -> list[_Exchange]:
        """Instruction, input and output of each row."""
        has_input = "input" in self.columns or column_of(table, "input", self.columns)
        expected = ["instruction"] + ["input"] * bool(has_input) + ["output"] * (self.purpose != "predict")
        cells = {name: [""] * len(table) for name in _NAMES}
        for name in expected:
            column = required_column(table, name, expected, self.columns)
            cells[name] = text_cells(table, column, may_be_empty=name != "instruction")
        return [_Exchange(*row) for row in zip(*cells.values(), strict=True)]

    def unlabelled(self, tables: Sequence[Table]) -> str:
        """Why there are no answers; empty if there are."""
        return self.without_column(tables, "output")

    def prompt(self, row: Row) -> str:
        """The filled-in template."""
        values: _Exchange = row.values
        template = self.template if values.input.strip() else self.template_without_input
        # One pass, so that a place written in the data itself is not filled in.
        return _PLACES.sub(lambda place: getattr(values, place[1]), template)


@dataclass(frozen=True, kw_only=True)
class InstructionEncoder(InstructionRows, CausalEncoder):
    """Prompt, answer, end of text; the last two are trained. An empty answer leaves a row nothing to train."""

    def render(self, row: Row, tokenizer: Tokenizer) -> list[Segment]:
        """The prompt and the answer."""
        output: str = row.values.output
        answer = Segment(output if output.strip() else "", True)
        return [Segment(self.prompt(row), False)] + ([] if self.purpose == "predict" else [answer])
