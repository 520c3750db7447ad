"""What was said so far in a chat, and how it is put to the model."""

from typing import Any

from peftlight.data.chat import Message
from peftlight.data.table import Table
from peftlight.writing.prompts import chat, encoded, plain
from peftlight.writing.writer import Prompt

_ROLES = {"user": "User", "assistant": "Assistant"}


class Conversation:
    """The system's text and the turns, rendered by the tokenizer's chat template.

    A tokenizer without one gets a plain format: the system's text and an empty line, then for each turn a line
    `User: ...` or `Assistant: ...`, and at the end the `Assistant:` that the model goes on from. Its answer ends where
    it begins a line `User:` itself.
    """

    def __init__(self, tokenizer: Any, encoder_decoder: bool, system: str = "") -> None:
        self.tokenizer, self.system = tokenizer, system
        self.has_template = bool(tokenizer.chat_template)
        self.encoder = chat() if self.has_template else plain(encoder_decoder)
        self.stop = "" if self.has_template else f"\n{_ROLES['user']}:"
        """Text that ends an answer."""
        self.turns: list[Message] = []

    def say(self, text: str) -> None:
        """The user's next turn."""
        self.turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        """The assistant's next turn."""
        self.turns.append({"role": "assistant", "content": text.strip()})

    def take_back(self) -> None:
        """Forget the user's last turn, which has no answer."""
        self.turns.pop()

    def forget(self, count: int) -> None:
        """Forget so many of the oldest turns."""
        del self.turns[:count]

    def prompt(self, number: int, without: int = 0) -> Prompt:
        """All that stands before the next answer.

        Args:
            number: decides, with the seed, what is drawn.
            without: so many of the oldest turns are left out.

        Raises:
            UserError: the chat template does not accept these turns.
        """
        turns = self.turns[without:]
        name, value = ("messages", self._messages(turns)) if self.has_template else ("prompt", self._plain(turns))
        table = Table("this chat", "turn", [name], [len(turns)], lambda column: [value])
        (prompt,) = encoded(table, self.encoder, self.tokenizer, number)
        return prompt

    def _messages(self, turns: list[Message]) -> list[Message]:
        return [{"role": "system", "content": self.system}] * bool(self.system) + turns

    def _plain(self, turns: list[Message]) -> str:
        lines = [f"{_ROLES[turn['role']]}: {turn['content']}" for turn in turns]
        return "\n".join([f"{self.system}\n"] * bool(self.system) + lines + [f"{_ROLES['assistant']}:"])
