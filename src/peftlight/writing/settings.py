"""How text is written: the options that commands which write share."""

from dataclasses import dataclass

from peftlight.errors import UserError

_LEAST: dict[str, float] = {"max_new_tokens": 1, "temperature": 0, "top_p": 0, "top_k": 0, "seed": 0}


@dataclass(frozen=True)
class Settings:
    """How each token is chosen, and how many there are at most.

    A command with a parameter of this kind has its fields as options. Nothing heavy is imported here.
    """

    max_new_tokens: int = 256
    """most tokens of an answer."""
    temperature: float = 0.0
    """0: always the likeliest token; above, tokens are drawn, and the higher it is the more unlikely ones."""
    top_p: float = 1.0
    """tokens are drawn from the likeliest that together have this probability."""
    top_k: int = 0
    """tokens are drawn from this many likeliest; 0: from all."""
    repetition_penalty: float = 1.0
    """above 1, tokens of the prompt and of the answer so far become less likely."""
    seed: int = 0
    """of what is drawn."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} is at least {least}; it is {getattr(self, name)}.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is a probability above 0 and at most 1; it is {self.top_p}.")
        if self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty is above 0, and 1 changes nothing; it is {self.repetition_penalty}.")
