"""The loop of a chat: questions, answers, and the commands between them."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from typing import get_type_hints

from peftlight.console import say
from peftlight.errors import UserError, listed, nearest
from peftlight.opened import Opened
from peftlight.writing.answering import BASE, side_by_side, use
from peftlight.writing.conversation import Conversation
from peftlight.writing.settings import Settings
from peftlight.writing.writer import Prompt, Writer


class Talk:
    """A chat with one of several adapters at a time, or with one and the base side by side."""

    def __init__(self, opened: Opened, name: str, settings: Settings, system: str) -> None:
        """
        Args:
            opened: the adapters on their base.
            name: who answers first.
            settings: how answers are written.
            system: text before all turns.

        Raises:
            UserError: the model writes no text.
        """
        self.opened, self.current, self.settings = opened, name, settings
        self.writer = Writer(opened)
        self.conversation = Conversation(opened.tokenizer, self.writer.reads_apart, system)
        self.beside_base = False
        self.asked = 0
        """Questions so far; with the seed it decides what is drawn."""
        self._commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "adapter": ("[NAME]", "let this adapter answer, or base; without a name: who there is", self.adapter),
            "both": ("", "base and adapter side by side; again: the adapter alone", lambda _: self.both()),
            "set": ("[KEY VALUE]", "change a setting, such as /set temperature 0.7; alone: show them", self.set),
            "system": ("[TEXT]", "the text before all turns; alone: none", self.system),
            "reset": ("", "forget all turns", lambda _: self.reset()),
            "help": ("", "this list", lambda _: self.help()),
            "quit": ("", "leave, as the end of input does", _leave),
        }

    def run(self) -> None:
        """Read lines and answer them until /quit, the end of the input, or Ctrl-C where nothing is being written.

        Raises:
            UserError: the input is no text.
        """
        with contextlib.suppress(EOFError, KeyboardInterrupt):
            while True:
                line = _next_line()
                try:
                    self.take(line)
                except UserError as error:
                    note(str(error))

    def take(self, line: str) -> None:
        """Obey a command or answer a question; an empty line is passed over.

        Raises:
            UserError: the command is unknown or cannot be obeyed, or the question cannot be answered.
        """
        if line.startswith("/"):
            word, _, rest = line[1:].partition(" ")
            if word not in self._commands:
                raise UserError(f"There is no command /{word}.{nearest(word, self._commands)} /help lists them.")
            self._commands[word][2](rest.strip())
        elif line:
            self.ask(line)

    def ask(self, question: str) -> None:
        """Print the answer, and keep both; side by side it is the adapter's answer that is kept.

        Raises:
            UserError: the question does not fit the model; it is forgotten then.
        """
        self.conversation.say(question)
        use(self.opened, self.current)
        try:
            prompt = self._prompt()
            self.conversation.answer(self._both(prompt) if self.beside_base else self._alone(prompt))
        except UserError:
            self.conversation.take_back()
            raise
        self.asked += 1

    def _prompt(self) -> Prompt:
        """All turns that the model has room for, the oldest forgotten where it has not; none where nothing helps."""
        last = len(self.conversation.turns) - 1
        for forgotten in range(0, last + 1, 2):
            prompt = self.conversation.prompt(self.asked, without=forgotten)
            try:
                self.writer.check([prompt], self.settings)
                break
            except UserError:
                if forgotten == last:
                    raise
        self.conversation.forget(forgotten)
        if dropped := forgotten // 2:
            note(f"The chat has become too long: the oldest {dropped} question{'s' * (dropped > 1)} with the answers "
                 "are forgotten.")  # fmt: skip
        return prompt

    def _alone(self, prompt: Prompt) -> str:
        print(f"{self.current}: ", end="", flush=True)
        begun = False

        def tell(text: str) -> None:
            nonlocal begun
            text = text if begun else text.lstrip()
            begun = begun or bool(text)
            print(text, end="", flush=True)

        answer = self.writer.stream(prompt, self.settings, tell, self.conversation.stop)
        print()
        return answer.text

    def _both(self, prompt: Prompt) -> str:
        answers: dict[str, str] = {}
        for name in (BASE, self.current):
            use(self.opened, name)
            answers[name] = self.writer.stream(prompt, self.settings, lambda text: None, self.conversation.stop).text
        say(side_by_side(answers))
        return answers[self.current]

    def adapter(self, name: str) -> None:
        """Let another adapter answer from now on, without loading anything.

        Raises:
            UserError: there is none of that name.
        """
        names = [BASE, *self.opened.adapters.names]
        if name:
            if name not in names:
                raise UserError(f"There is no adapter {name!r}.{nearest(name, names)} There are: {listed(names, 20)}.")
            self.current, self.beside_base = name, self.beside_base and name != BASE
        note(f"{self.current} answers; there are: {listed(names, 20)}.")

    def both(self) -> None:
        """Begin or end the answers side by side.

        Raises:
            UserError: it is the base alone that answers.
        """
        if self.current == BASE:
            raise UserError(f"Beside {BASE} stands an adapter: choose one first. There are: "
                            f"{listed(self.opened.adapters.names) or 'none'}.")  # fmt: skip
        self.beside_base = not self.beside_base
        note(f"{f'{BASE} and ' if self.beside_base else ''}{self.current} answer{'' if self.beside_base else 's'}.")

    def set(self, change: str) -> None:
        """Change one of the settings.

        Raises:
            UserError: there is no such setting, or it does not take the value.
        """
        key, _, value = change.partition(" ")
        kinds = get_type_hints(Settings)
        if key:
            if key not in kinds:
                raise UserError(f"There is no setting {key!r}.{nearest(key, kinds)} There are: {listed(kinds)}.")
            try:
                self.settings = dataclasses.replace(self.settings, **{key: kinds[key](value)})
            except ValueError:
                raise UserError(f"{key} takes a number ({kinds[key].__name__}), not {value!r}.") from None
        note(", ".join(f"{name} {value}" for name, value in dataclasses.asdict(self.settings).items()))

    def system(self, text: str) -> None:
        """Put another text before all turns."""
        self.conversation.system = text
        note(f"system: {text or 'none'}")

    def reset(self) -> None:
        """Forget all turns."""
        self.conversation.turns.clear()
        self.asked = 0
        note("All turns are forgotten.")

    def help(self) -> None:
        """List the commands."""
        for word, (taken, what, _) in self._commands.items():
            note(f"  {f'/{word} {taken}':20}{what}")
        note("Ctrl-C ends an answer; where none is being written, it leaves.")


def _leave(_: str) -> None:
    raise EOFError


def _next_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"The input is not UTF-8 (byte 0x{error.object[error.start]:02x}).") from None


def note(text: str) -> None:
    """Say something that is no answer."""
    print(text, file=sys.stderr, flush=True)
