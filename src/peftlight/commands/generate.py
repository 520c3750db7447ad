"""`peftlight generate`: let adapters write after prompts."""

import json
import sys
from typing import Any, Literal

from peftlight.opening import Opening
from peftlight.writing.settings import Settings


def generate(
    adapters: list[str],
    settings: Settings,
    opening: Opening,
    prompt: str | None = None,
    file: str | None = None,
    out: str | None = None,
    batch_size: int | None = None,
    template: Literal["trained", "plain", "chat"] = "trained",
) -> None:
    """Write after a prompt, after each prompt of a file, or after each line of a pipe.

    Of one prompt the answer is shown as it comes, several adapters' answers side by side. Else each answer is one line
    of JSON: id (the prompt's number from 0), adapter, prompt, completion, finish_reason (stop or length), tokens. Each
    answer is what it would be alone, whatever the batch.

    Args:
        adapters: folders of adapters, or NAME=FOLDER; the word base stands for the model without any.
        prompt: the text to write after.
        file: prompts: the lines of a .txt file, or the rows of another (jsonl, csv, ...) with a column prompt, the
            columns of the training, or messages. Without prompt and file, the lines of the standard input.
        out: a JSONL file for the answers.
        batch_size: prompts that are computed at a time; by default 8, from a pipe 1: each line is answered at once.
        template: how a prompt is put to the model: as in the training, plain, or by the tokenizer's chat template.
        settings: how text is written.
        opening: the base, and what is allowed.
    """
    from peftlight.errors import UserError
    from peftlight.files import write_text
    from peftlight.writing.answering import Answers, opened_with_base
    from peftlight.writing.prompts import tables_of

    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size is at least 1; it is {batch_size}.")
    piped = prompt is None and file is None
    tables = tables_of(prompt, file, batch_size or 1)
    given = tables if piped else list(tables)  # what cannot be read is refused before the base is loaded
    opened, names = opened_with_base(adapters, opening)
    answers = Answers(opened, names, template, settings)
    if out is not None:
        lines = [_line(record) for record in answers.records(given, batch_size or 8)]
        write_text(out, "".join(lines))
        print(f"{len(lines)} answers: {out}", file=sys.stderr)
        return
    if prompt is not None:
        answers.show(next(iter(given)))
        return
    for record in answers.records(given, batch_size or (1 if piped else 8)):
        print(_line(record), end="", flush=True)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"
