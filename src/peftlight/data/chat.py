"""Chat templates: the text of a conversation, and where in it the assistant speaks."""

import re
from typing import Any

from peftlight.data.tokenizer import Tokenizer
from peftlight.errors import UserError

Message = dict[str, Any]
"""One turn: role, content and whatever else the template reads."""
Span = tuple[int, int]
"""The first character, and the one after the last."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANSWER = "an answer"
_MARKERS = "Put {% generation %} ... {% endgeneration %} around the assistant's turns in the tokenizer's chat template"


def prompt_of(messages: list[Message], tokenizer: Tokenizer, where: str) -> str:
    """What stands before the answer: everything up to a last turn of the assistant, and the opening of its turn."""
    answered = messages[-1]["role"] == "assistant"
    return _rendered(messages[:-1] if answered else messages, tokenizer, where, opens_turn=True)


def assistant_spans(messages: list[Message], tokenizer: Tokenizer, where: str) -> tuple[str, list[Span]]:
    """The whole conversation as text, and the assistant's turns in it.

    Raises:
        UserError: there is no template, it refuses the conversation, or it does not show where the turns are.
    """
    if _GENERATION.search(_template(tokenizer)):
        return _marked(messages, tokenizer, where)
    text = _rendered(messages, tokenizer, where)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    return text, [_span(messages, index, text, tokenizer, where) for index in turns]


def turn_end(tokenizer: Tokenizer) -> int | None:
    """The special token with which the template ends a turn of the assistant; None where it ends with plain text.

    Raises:
        UserError: there is no template, or it does not take a question and an answer.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    after = _rendered(messages, tokenizer, "The tokenizer").rpartition(_ANSWER)[2]
    ids = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None
    return int(ids[0]) if token is not None and token.special else None


def _template(tokenizer: Tokenizer) -> str:
    if not tokenizer.chat_template:
        fix = "Use the tokenizer of a chat model (--data.tokenizer NAME), or Instructions, which needs no template"
        raise UserError(f"The tokenizer has no chat template to render messages with. {fix}.")
    return str(tokenizer.get_chat_template())


def _rendered(messages: list[Message], tokenizer: Tokenizer, where: str, opens_turn: bool = False) -> str:
    _template(tokenizer)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens_turn))
    except Exception as error:  # templates raise what they like
        raise UserError(_refused(messages, where, error)) from error


def _refused(messages: list[Message], where: str, error: Exception) -> str:
    roles = ", ".join(message["role"] for message in messages) or "none"
    return f"{where}: the chat template does not accept these messages (roles: {roles}): {error}"


def _marked(messages: list[Message], tokenizer: Tokenizer, where: str) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=_template(tokenizer),
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise what they like
        raise UserError(_refused(messages, where, error)) from error
    (text,), (spans,) = rendered
    return text, [(start, _with_eos(text, end, tokenizer)) for start, end in spans]


def _with_eos(text: str, end: int, tokenizer: Tokenizer) -> int:
    """A turn whose template ends the marked part before the end token: without that token it would never stop."""
    eos = tokenizer.eos_token
    return end + len(eos) if eos and text.startswith(eos, end) else end


def _span(messages: list[Message], index: int, text: str, tokenizer: Tokenizer, where: str) -> Span:
    if index == 0:
        raise UserError(
            f"{where}: the assistant speaks first, so that nothing shows where its turn begins. {_MARKERS}."
        )
    before = _rendered(messages[:index], tokenizer, where, opens_turn=True)
    until = _rendered(messages[: index + 1], tokenizer, where)
    if not (text.startswith(before) and text.startswith(until) and len(before) <= len(until)):
        problem = f"the chat template writes turn {index + 1} differently depending on what follows"
        raise UserError(f"{where}: {problem}, so that it cannot be marked for training. {_MARKERS}.")
    return len(before), len(until)
