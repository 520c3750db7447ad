"""Text written by a language model: batches whose rows equal single prompts, and one answer as it comes."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from peftlight.data.batching import Collator
from peftlight.data.chat import turn_end
from peftlight.errors import UserError, listed
from peftlight.opened import Opened
from peftlight.writing.answer import Answer
from peftlight.writing.choosing import Choosing
from peftlight.writing.settings import Settings

_KEPT = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""What of a base's settings for writing is part of how it is read; the others are the user's to choose."""


@dataclass(frozen=True)
class Prompt:
    """What stands before an answer."""

    number: int
    """Its place among all prompts, from 0; with the seed it decides what is drawn."""
    where: str
    """As an error message begins."""
    tokens: list[int]


@dataclass(frozen=True)
class Written:
    """An answer."""

    text: str
    tokens: int
    """How many it has, the one that ends it among them."""
    finish: Literal["stop", "length", "interrupted"]
    """The model ended it; or it reached its greatest length; or Ctrl-C came."""


class Writer:
    """Lets a base, with those of its adapters that are in use, write after prompts.

    It owns the model: the base's own settings for writing (sampling, penalties, lengths) are dropped.
    """

    def __init__(self, opened: Opened) -> None:
        """
        Raises:
            UserError: the model does not write text.
        """
        check_writes(opened)
        model: Any = opened.model
        self.model, self.adapters, self.tokenizer = model, opened.adapters, opened.tokenizer
        self.reads_apart = bool(model.config.is_encoder_decoder)
        self.ends = _ends(self.model, self.tokenizer)
        self._pad = next((i for i in (self.tokenizer.pad_token_id, *self.ends) if i is not None), 0)
        self._forget_settings()

    def write(self, prompts: Sequence[Prompt], settings: Settings) -> list[Written]:
        """The answers to a batch of prompts, each as it would be alone.

        Raises:
            UserError: a prompt is empty, or leaves the model no positions for the answer.
        """
        self.check(prompts, settings)
        rows = self._generated(prompts, settings, [])
        return [self._written(row) for row in rows]

    def stream(self, prompt: Prompt, settings: Settings, tell: Callable[[str], None], stop: str = "") -> Written:
        """The answer to one prompt, its text told piece by piece; Ctrl-C ends it.

        Args:
            prompt: what stands before it.
            settings: how it is written.
            tell: gets each new piece of text.
            stop: text that ends the answer and is no part of it.

        Raises:
            UserError: as `write`.
        """
        self.check([prompt], settings)
        answer = Answer(self._decoded, self.ends, stop, tell)
        try:
            self._generated([prompt], settings, [answer])
        except KeyboardInterrupt:
            answer.end()
            return Written(answer.text, len(answer.tokens), "interrupted")
        answer.end()
        return Written(answer.text, len(answer.tokens), "stop" if answer.stopped else "length")

    def check(self, prompts: Sequence[Prompt], settings: Settings) -> None:
        """See that each prompt has tokens, and that the model has positions for them and for its answer.

        Raises:
            UserError: with the numbers that would fit.
        """
        for prompt in prompts:
            if not prompt.tokens:
                raise UserError(f"{prompt.where}: the prompt has no tokens. Give the model a word to begin with.")
            self._check_length(prompt, settings.max_new_tokens)

    def _check_length(self, prompt: Prompt, new: int) -> None:
        count = len(prompt.tokens)
        needed = max(count, new) if self.reads_apart else count + new
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or needed
        where = f"{prompt.where}, {count} tokens, with max_new_tokens={new}"
        if needed > most:
            fits = most if self.reads_apart and count <= most else most - count
            fix = f"Give --max_new_tokens {fits} or less." if fits > 0 else "Shorten it."
            raise UserError(f"{where}: {needed} positions are needed, and the model has {most}. {fix}")
        for name in self.adapters.in_use:
            for delta in self.adapters[name].sites.values():
                try:
                    delta.check_length(needed)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None

    def _generated(self, prompts: Sequence[Prompt], settings: Settings, listeners: list[Any]) -> list[list[int]]:
        """The new tokens of each row."""
        left = not self.reads_apart  # an encoder counts its positions from the left
        items: Any = [{"input_ids": np.asarray(p.tokens), "row": p.number} for p in prompts]
        batch = {key: value.to(self.model.device) for key, value in Collator(self._pad, left)(items).items()}
        start = batch["input_ids"].shape[1] if left else 1
        padding = [start - len(prompt.tokens) if left else 1 for prompt in prompts]
        written = self.model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            max_new_tokens=settings.max_new_tokens, do_sample=False, num_beams=1,
            eos_token_id=self.ends or None, pad_token_id=self._pad,
            logits_processor=[Choosing(settings, [prompt.number for prompt in prompts], padding)],
            stopping_criteria=listeners,
        )  # fmt: skip
        rows: list[list[int]] = written[:, start:].tolist()
        return rows

    def _written(self, row: list[int]) -> Written:
        end = next((place for place, token in enumerate(row) if token in self.ends), None)
        kept = row if end is None else row[: end + 1]
        return Written(self._decoded(kept), len(kept), "length" if end is None else "stop")

    def _decoded(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _forget_settings(self) -> None:
        from transformers import GenerationConfig

        given = self.model.generation_config
        self.model.generation_config = GenerationConfig(**{name: getattr(given, name) for name in _KEPT})


def check_writes(opened: Opened) -> None:
    """See that the model of the adapters is one that writes text.

    Raises:
        UserError: it chooses among classes, say.
    """
    if opened.auto_class not in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        what = opened.auto_class.removeprefix("AutoModelFor").removeprefix("AutoModel") or "bare encoder"
        whose = listed(opened.adapters.names) or opened.source.name
        raise UserError(
            f"{whose} belongs to a model that writes no text (its kind: {what}). For its predictions on the rows of a "
            "file: peftlight predict ADAPTER FILE"
        )


def on_the_best_device(opened: Opened) -> None:
    """Move the model and its adapters to the graphics card, where there is one."""
    if torch.cuda.is_available():
        opened.model.to("cuda")


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the base's, the tokenizer's, and the one that ends a turn of its chat template."""
    given = model.generation_config.eos_token_id
    ends = [*given] if isinstance(given, list) else [given]
    with contextlib.suppress(UserError):  # a template that refuses the question tells nothing of its turns' ends
        ends.append(turn_end(tokenizer))
    return list(dict.fromkeys(int(end) for end in (*ends, tokenizer.eos_token_id) if end is not None))
