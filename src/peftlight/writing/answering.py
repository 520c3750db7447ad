"""Several adapters of one base, and the base itself, that answer the same prompts."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table as Columns

from peftlight.console import say
from peftlight.data.encoder import Encoder
from peftlight.data.table import Table
from peftlight.errors import UserError, listed
from peftlight.opened import Opened, open_adapters
from peftlight.opening import Opening
from peftlight.writing.prompts import Template, encoded, encoder_for, plain
from peftlight.writing.settings import Settings
from peftlight.writing.writer import Prompt, Writer, Written, on_the_best_device

BASE = "base"
"""In the place of an adapter: the model without any."""
_WINDOW = 16
"""So many batches are sorted by length together."""


def opened_with_base(given: Sequence[str], opening: Opening) -> tuple[Opened, list[str]]:
    """The adapters on their base, and the names of those given in order, "base" among them if it was given.

    Raises:
        UserError: as `open_adapters`; or an adapter has the name that is kept for the base.
    """
    opened = open_adapters([each for each in given if each != BASE], opening)
    if BASE in opened.adapters.names:
        raise UserError(f"{BASE!r} is the model without adapters. Give the adapter another name: NAME=FOLDER")
    if BASE in given and opened.new:
        raise UserError(f"The base cannot answer alone: {opened.source.name} has no weights for {listed(opened.new)}.")
    on_the_best_device(opened)
    loaded = iter(opened.adapters.names)
    return opened, list(dict.fromkeys(BASE if each == BASE else next(loaded) for each in given))


def use(opened: Opened, name: str) -> None:
    """Let the model compute with the adapter of that name, or as the base.

    Raises:
        UserError: there is no such adapter.
    """
    opened.adapters.use(*([] if name == BASE else [name]))


class Answers:
    """What each of several answers to prompts."""

    def __init__(self, opened: Opened, names: Sequence[str], template: Template, settings: Settings) -> None:
        """
        Args:
            opened: the adapters on their base.
            names: who answers.
            template: how the prompts are put; the base gets them as the first adapter does.
            settings: how the answers are written.

        Raises:
            UserError: the model writes no text.
        """
        self.opened, self.settings = opened, settings
        self.writer = Writer(opened)
        self.encoders = self._encoders(names, template)

    def records(self, tables: Iterable[Table], batch_size: int) -> Iterator[dict[str, Any]]:
        """One record for each answer, in the order of the prompts.

        Raises:
            UserError: a prompt is empty or too long; nothing of its table has been answered then.
        """
        first = 0
        for table in tables:
            prompts = {name: self._prompts(name, table, first) for name in self.encoders}
            first += len(table)
            for start in range(0, len(table), _WINDOW * batch_size):
                window = {name: rows[start : start + _WINDOW * batch_size] for name, rows in prompts.items()}
                answers = {name: self._answered(name, rows, batch_size) for name, rows in window.items()}
                for place in range(len(next(iter(window.values())))):
                    for name, rows in window.items():
                        yield self._record(name, rows[place], answers[name][place])

    def show(self, table: Table) -> None:
        """Print the answer to the table's first prompt as it comes; those of several side by side."""
        prompts = {name: self._prompts(name, table, 0)[0] for name in self.encoders}
        if len(prompts) > 1:
            say(side_by_side({name: self._answered(name, [one], 1)[0].text for name, one in prompts.items()}))
            return
        for name, prompt in prompts.items():
            use(self.opened, name)
            self.writer.stream(prompt, self.settings, lambda text: print(text, end="", flush=True))
            print()

    def _encoders(self, names: Sequence[str], template: Template) -> dict[str, Encoder]:
        apart = self.writer.reads_apart
        found = {name: encoder_for(self.opened.records.get(name), template, apart) for name in names}
        for_base = next((encoder for encoder in found.values() if encoder), None)
        if silent := [name for name, encoder in found.items() if encoder is None and name != BASE]:
            print(f"{listed(silent)}: how prompts were put in the training is not recorded, so they are taken as they "
                  "are. For the chat template: --template chat", file=sys.stderr)  # fmt: skip
        return {
            name: encoder or (for_base if name == BASE else None) or plain(apart) for name, encoder in found.items()
        }

    def _prompts(self, name: str, table: Table, first: int) -> list[Prompt]:
        prompts = encoded(table, self.encoders[name], self.opened.tokenizer, first)
        use(self.opened, name)
        self.writer.check(prompts, self.settings)
        return prompts

    def _answered(self, name: str, prompts: Sequence[Prompt], batch_size: int) -> list[Written]:
        """The answers in the order of the prompts; rows of like length share a batch, so there is little to pad."""
        use(self.opened, name)
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place].tokens))
        found: dict[int, Written] = {}
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            answers = self.writer.write([prompts[place] for place in places], self.settings)
            found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(prompts))]

    def _record(self, name: str, prompt: Prompt, answer: Written) -> dict[str, Any]:
        return {
            "id": prompt.number,
            "adapter": name,
            "prompt": self.opened.tokenizer.decode(prompt.tokens, skip_special_tokens=True),
            "completion": answer.text,
            "finish_reason": answer.finish,
            "tokens": answer.tokens,
        }


def side_by_side(answers: Mapping[str, str]) -> Columns:
    """A table with a column for each answer, headed by who gave it."""
    table = Columns(*answers, show_lines=True)
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    table.add_row(*(text.strip() for text in answers.values()))
    table.expand = True
    return table
