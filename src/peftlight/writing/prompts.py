"""From what the user gives (a text, a file, a pipe) to prompts, put to the model as in the adapter's training."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_type_hints

from peftlight.data.encoder import Encoder, Row
from peftlight.data.instruction_pairs import InstructionPairEncoder
from peftlight.data.instructions import InstructionEncoder, InstructionRows
from peftlight.data.messages import MessageEncoder
from peftlight.data.plain_text import PlainTextEncoder
from peftlight.data.reading import READERS, read_file
from peftlight.data.source_target import SourceTargetEncoder
from peftlight.data.table import Table
from peftlight.errors import UserError, listed, nearest
from peftlight.interop import Record
from peftlight.typed import fits
from peftlight.writing.writer import Prompt

Template = Literal["trained", "plain", "chat"]

_ENCODERS: dict[str, type[Encoder]] = {
    encoder.__name__: encoder
    for encoder in (PlainTextEncoder, InstructionEncoder, MessageEncoder, SourceTargetEncoder, InstructionPairEncoder)
}
_UNCUT = sys.maxsize
"""As greatest length: a prompt that is too long is refused, never cut."""
_WHOLE: dict[str, Any] = {"columns": {}, "max_length": _UNCUT, "purpose": "predict"}


def tables_of(prompt: str | None, file: str | None, at_once: int) -> Iterator[Table]:
    """The prompts that were given: a text, a file, or else what comes through the pipe, `at_once` lines at a time.

    Raises:
        UserError: none or several of these were given; there is no such file, or it cannot be read.
    """
    if prompt is not None and file is not None:
        raise UserError("Both --prompt and --file are given; choose one.")
    if prompt is not None:
        yield _texts("--prompt", [(1, prompt)])
    elif file is not None:
        yield _table(Path(file).expanduser())
    else:
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError("There is nothing to write after: give --prompt TEXT or --file FILE, or pipe lines in.")
        lines = _lines(sys.stdin.buffer, "standard input")
        while some := list(islice(lines, at_once)):
            yield _texts("standard input", some)


def encoder_for(record: Record | None, template: Template, encoder_decoder: bool) -> Encoder | None:
    """How prompts are put to the model: by the record of a training; None where that does not say it.

    Raises:
        UserError: the training used a class of the user's own, or its settings are damaged.
    """
    if template == "chat":
        return chat()
    if template == "plain":
        return plain(encoder_decoder)
    given = ((record and record.data) or {}).get("encoder")
    return None if given is None else _as_trained(given)


def plain(encoder_decoder: bool) -> Encoder:
    """Prompts as they are."""
    if encoder_decoder:
        return SourceTargetEncoder(**_WHOLE, prefix="", max_target_length=_UNCUT)
    return PlainTextEncoder(**_WHOLE)


def chat() -> Encoder:
    """Prompts in the tokenizer's chat template."""
    return MessageEncoder(**_WHOLE)


def encoded(table: Table, encoder: Encoder, tokenizer: Any, first: int) -> list[Prompt]:
    """The rows of a table as prompts, counted from `first`: its column `prompt`, those of the training, or messages.

    Raises:
        UserError: it has none of these, or a row's cell is no prompt.
    """
    table, encoder = _matched(table, encoder)
    rows = [Row(values, table, place) for place, values in enumerate(encoder.rows(table))]
    tokens = (row.input_ids for row in encoder.tokenize(rows, tokenizer))
    return [Prompt(first + row.position, row.where, ids) for row, ids in zip(rows, tokens, strict=True)]


def _as_trained(given: Any) -> Encoder:
    settings = dict(given) if isinstance(given, dict) else {}
    kind = str(settings.pop("encoder", None))
    if kind not in _ENCODERS:
        raise UserError(
            f"The adapter was trained on prompts of a class that is not peftlight's, {kind}: what it made of them is "
            "not known here. Write them as the class would, and give --template plain."
        )
    hints = get_type_hints(_ENCODERS[kind])
    names = {field.name for field in dataclasses.fields(_ENCODERS[kind])}
    settings |= {name: value for name, value in _WHOLE.items() if name != "columns"}
    if settings.keys() != names or not all(fits(settings[name], hints[name]) for name in names):
        raise UserError(f"The adapter's record of its prompts is damaged: {kind} takes {listed(sorted(names))}. "
                        "Give --template plain or chat.")  # fmt: skip
    return _ENCODERS[kind](**settings)


def _matched(table: Table, encoder: Encoder) -> tuple[Table, Encoder]:
    """The table with its column of prompts where the encoder looks for it."""
    column = _column(encoder)
    if "prompt" in table.columns:
        return _renamed(table, column), dataclasses.replace(encoder, columns={})
    if encoder.columns.get(column, column) in table.columns:
        return table, encoder
    if "messages" in table.columns:
        return table, chat()
    known = dict.fromkeys(["prompt", encoder.columns.get(column, column), "messages"])
    raise UserError(f"{table.name} has no column of prompts. Columns found: {listed(table.columns)}. "
                    f"Expected one of: {listed(known)}.")  # fmt: skip


def _column(encoder: Encoder) -> str:
    """Where the encoder looks for what a user writes."""
    if isinstance(encoder, InstructionRows):
        return "instruction"
    if isinstance(encoder, MessageEncoder):
        return "messages"
    return "source" if isinstance(encoder, SourceTargetEncoder) else "text"


def _renamed(table: Table, column: str) -> Table:
    """The column `prompt` alone, under that name; for messages each text becomes one of the user's."""

    def cells(name: str) -> list[object]:
        texts = table.cells("prompt")
        return [[{"role": "user", "content": text}] for text in texts] if name == "messages" else list(texts)

    return dataclasses.replace(table, columns=[column], cells=cells)


def _table(path: Path) -> Table:
    if not path.is_file():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"There is no file {path}.{nearest(path.name, siblings)}")
    if path.suffix.lower() in READERS:
        return read_file(path)
    if path.suffix.lower() != ".txt":
        raise UserError(f"{path}: cannot read files ending in {path.suffix!r}; known are {listed(['.txt', *READERS])}.")
    with open(path, "rb") as file:
        found = list(_lines(file, str(path)))
    if not found:
        raise UserError(f"{path} is empty.")
    return _texts(str(path), found)


def _lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {number}: not UTF-8 (byte 0x{line[error.start]:02x}).") from None
        if text.strip():
            yield number, text


def _texts(name: str, lines: Iterable[tuple[int, str]]) -> Table:
    numbers, texts = zip(*lines, strict=True)
    return Table(name, "line", ["prompt"], numbers, lambda column: texts)
