"""The Power of Scale for Parameter-Efficient Prompt Tuning.

Brian Lester, Rami Al-Rfou, Noah Constant, 2021, https://arxiv.org/abs/2104.08691
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from peftlight.delta import Delta
from peftlight.entrance import Compat, check_count, decoder_of, deltas_for, entrance_of
from peftlight.errors import UserError, listed, nearest
from peftlight.strategy import Adapter, Material, PEFTStrategy
from peftlight.virtual_tokens import Entrance, Prompt, VirtualTokens

_COMMON = 5000
"""Vocabularies begin with the most frequent tokens; the paper samples from so many."""


@dataclass
class PromptTuning(PEFTStrategy):
    """Train virtual tokens that stand before the embeddings of the real ones (section 2 of the paper: [P; X])."""

    num_virtual_tokens: int = 20
    """Number n of virtual tokens."""
    init: Literal["random", "sampled_vocabulary", "text"] = "sampled_vocabulary"
    """What they start from: normal values as large as embeddings are, embeddings of frequent tokens, or of a text."""
    init_text: str | None = None
    """The text for init: text; repeated or cut to the number of virtual tokens."""
    init_token_ids: list[int] | None = None
    """The tokens of that text, where no data module is there to make them from it."""
    compat: Compat | None = None
    """peft: HF PEFT's numbers, with outputs and pooling that include the virtual tokens; none: the real ones alone."""

    starts_unchanged = False

    def __post_init__(self) -> None:
        check_number(self.num_virtual_tokens, "PromptTuning")
        check_choice("init", self.init, ("random", "sampled_vocabulary", "text"))
        check_choice("compat", self.compat, (None, "peft"))
        given = [name for name in ("init_text", "init_token_ids") if getattr(self, name) is not None]
        if self.init != "text" and given:
            raise UserError(f"{listed(given)} belongs to init: text, but init is {self.init}.")
        if self.init == "text" and len(given) != 1:
            raise UserError(f"init: text needs init_text or init_token_ids; got {' and '.join(given) or 'neither'}.")
        if self.init == "text" and not (self.init_token_ids or (self.init_text or "").strip()):
            raise UserError(f"{given[0]} is empty: give a text that describes the task, or choose init: random.")

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        entrance = entrance_of(model, "PromptTuning", self.compat)
        check_count(self.num_virtual_tokens, entrance, "PromptTuning")
        prompt = self._start(model, entrance)
        yield from deltas_for(model, prompt, self.num_virtual_tokens, entrance, self.compat)

    def prepare(self, adapter: Adapter, material: Material) -> None:
        if self.init_text is None:
            return
        tokens = material.token_ids(self.init_text)
        for site, delta in adapter.sites.items():
            if isinstance(delta, VirtualTokens) and isinstance(delta.prompt, Prompt):
                module = adapter.model.get_submodule(site)
                delta.prompt.fill(_repeated(tokens, len(delta.prompt.weight), delta.entrance, module, self.init_text))

    def _start(self, model: nn.Module, entrance: Entrance) -> Prompt:
        """The virtual tokens at the start. Random numbers are drawn as HF PEFT does: first the normal ones, always."""
        module = model.get_submodule(entrance.path)
        noise = torch.empty(
            rows_for(model, self.num_virtual_tokens, self.compat), entrance.width, device="cpu"
        ).normal_()
        if self.init_token_ids is not None:
            return Prompt(_repeated(self.init_token_ids, len(noise), entrance, module, str(self.init_token_ids)))
        if self.init == "text":
            why = (
                "PromptTuning was to start from init_text, but nobody has made tokens of it: that happens when a "
                "Trainer begins to fit. Load a trained adapter, or give init_token_ids."
            )
            return Prompt(torch.full_like(noise, torch.nan), pending=why)
        if self.init == "random" and self.compat == "peft":
            return Prompt(noise)
        vocabulary = _vocabulary(module, entrance)
        common = vocabulary if self.compat == "peft" else min(vocabulary, _COMMON)
        if self.init == "sampled_vocabulary":
            return Prompt(_embeddings(torch.randint(0, common, (len(noise),)), entrance, module))
        return Prompt(noise * _embeddings(torch.arange(common), entrance, module).std())


def check_number(count: int, method: str) -> None:
    """
    Raises:
        UserError: there are to be no virtual tokens.
    """
    if count < 1:
        raise UserError(f"{method} needs at least one virtual token; num_virtual_tokens is {count}.")


def check_choice(name: str, value: str | None, known: tuple[str | None, ...]) -> None:
    """
    Raises:
        UserError: the value of the field `name` is none of those known.
    """
    if value not in known:
        words = [word or "null" for word in known]
        raise UserError(f"{name} is {value!r}; expected {listed(words)}.{nearest(str(value), words)}")


def rows_for(model: nn.Module, count: int, compat: Compat | None) -> int:
    """How many rows a prompt has: HF PEFT keeps as many again for the decoder, and never reads them."""
    return 2 * count if compat == "peft" and decoder_of(model) else count


def _repeated(tokens: list[int], count: int, entrance: Entrance, module: nn.Module, where: str) -> Tensor:
    """The embeddings of the tokens, repeated or cut to `count`."""
    vocabulary = _vocabulary(module, entrance)
    if not tokens:
        raise UserError(f"The text to start from has no tokens: {where!r}.")
    if not all(0 <= token < vocabulary for token in tokens):
        raise UserError(
            f"The tokens to start from go from {min(tokens)} to {max(tokens)}, but the model has embeddings for 0 to "
            f"{vocabulary - 1}: {where}."
        )
    repeated = tokens * -(-count // len(tokens))
    return _embeddings(torch.tensor(repeated[:count]), entrance, module)


def _embeddings(tokens: Tensor, entrance: Entrance, module: nn.Module) -> Tensor:
    table = module.get_submodule(entrance.table).get_parameter("weight")
    with torch.no_grad():
        return entrance.embed(module, tokens.to(table.device)).to("cpu", torch.float32)


def _vocabulary(module: nn.Module, entrance: Entrance) -> int:
    return len(module.get_submodule(entrance.table).get_parameter("weight"))
