"""What is trained: compared with a second, direct way to find it, and read back as text."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftlight.data import Alpaca, Instructions, PlainText
from peftlight.data.instructions import WITH_INPUT, WITHOUT_INPUT
from peftlight.data.render import Segment, trained_tokens

ROWS = [
    {"instruction": "Name three colours.", "input": "", "output": "Red, green and blue."},
    {
        "instruction": "Shorten {input}.",
        "input": "The long {output} film",
        "output": "A film \u2013 long \U0001f3ac\n\ndone ",
    },
    {"instruction": "Answer briefly.", "input": "42?", "output": "Yes"},
    {"instruction": "Count.", "input": "  ", "output": "1\n2\n3"},
] * 3


def _prompt(row: dict[str, str]) -> str:
    if not row["input"].strip():
        head, tail = WITHOUT_INPUT.split("{instruction}")
        return head + row["instruction"] + tail
    head, rest = WITH_INPUT.split("{instruction}")
    middle, tail = rest.split("{input}")
    return head + row["instruction"] + middle + row["input"] + tail


def _rows(loader: Any) -> dict[int, dict[str, torch.Tensor]]:
    """Each row of a loader by its number, without its padding."""
    rows = {}
    for batch in loader:
        for index, row in enumerate(batch["row"].tolist()):
            real = batch["attention_mask"][index].bool()
            rows[row] = {key: batch[key][index][real] for key in ("input_ids", "labels") if key in batch}
    return rows


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("trims", [False, True])
def test_instruction_masks_are_prompt_then_answer_then_eos(
    bpe: Callable[..., Any], write: Callable[..., str], bos: bool, trims: bool
) -> None:
    tokenizer = bpe(bos=bos, trims=trims)
    data = Instructions(source=write("a.json", ROWS), validation_size=2, tokenizer=tokenizer, batch_size=3)
    data.setup("fit")
    rows = _rows(data.train_dataloader()) | _rows(data.val_dataloader())
    assert sorted(rows) == list(range(len(ROWS)))
    for number, row in rows.items():
        # Byte-level BPE splits at the line break before the answer, so the two halves may be tokenized alone.
        prompt = tokenizer(_prompt(ROWS[number]), add_special_tokens=False)["input_ids"]
        answer = tokenizer(ROWS[number]["output"], add_special_tokens=False)["input_ids"]
        prompt = [tokenizer.bos_token_id, *prompt] if bos else prompt
        answer = [*answer, tokenizer.eos_token_id]
        assert row["input_ids"].tolist() == prompt + answer
        assert row["labels"].tolist() == [-100] * len(prompt) + answer
        trained = row["labels"][row["labels"] != -100]
        assert tokenizer.decode(trained) == ROWS[number]["output"] + "</s>"


def test_padding_that_is_eos_leaves_the_eos_label(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    tokenizer = bpe(pad=False)
    data = Instructions(source=write("a.json", ROWS), tokenizer=tokenizer, pad_token="</s>", batch_size=12)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert (batch["input_ids"][padding] == tokenizer.eos_token_id).all()
    assert (batch["labels"][padding] == -100).all()
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["labels"][torch.arange(len(last)), last] == tokenizer.eos_token_id).all()


def test_a_text_that_begins_with_bos_gets_no_second_one(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    tokenizer = bpe(bos=True)
    rows = [{"text": "<s>the film</s>"}, {"text": "the film"}]
    data = PlainText(source=write("a.jsonl", rows), tokenizer=tokenizer, validation_size=1)
    data.setup("fit")
    both = _rows(data.train_dataloader()) | _rows(data.val_dataloader())
    assert both[0]["input_ids"].tolist() == both[1]["input_ids"].tolist()
    assert both[0]["input_ids"].tolist().count(tokenizer.bos_token_id) == 1
    assert both[0]["input_ids"].tolist().count(tokenizer.eos_token_id) == 1


def test_plain_text_trains_every_token(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    tokenizer = bpe(trims=True)
    texts = ["the  quick\n\n brown fox", "  dog \t", "\U0001f3ac film"]
    data = PlainText(source=write("a.json", [{"text": text} for text in texts]), tokenizer=tokenizer, validation_size=1)
    data.setup("fit")
    for number, row in (_rows(data.train_dataloader()) | _rows(data.val_dataloader())).items():
        assert torch.equal(row["labels"], row["input_ids"])
        assert tokenizer.decode(row["input_ids"]) == texts[number] + "</s>"


def test_masks_follow_the_spans_of_random_texts(bpe: Callable[..., Any]) -> None:
    """Characters of the trained segments, and no others, are covered by trained tokens (but for shared tokens)."""
    tokenizer = bpe()
    draw = random.Random(0)
    letters = "ab \n\té\u4e2d\U0001f3ac,.<"
    for _ in range(200):
        segments = [Segment("".join(draw.choices(letters, k=draw.randrange(6))), bool(place % 2)) for place in range(5)]
        text = "".join(segment.text for segment in segments)
        wanted = [segment.trained for segment in segments for _ in segment.text]
        spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        mask = trained_tokens(segments, spans)
        assert mask.tolist() == [int(any(wanted[start:end])) for start, end in spans]


def test_truncation_drops_rows_whose_prompt_fills_everything(
    bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 30 + [{"instruction": "word " * 200, "output": "b"}]
    tokenizer = bpe()
    data = Instructions(
        source=write("a.jsonl", rows), tokenizer=tokenizer, max_length=200, validation_size=1, split_seed=1
    )
    data.setup("fit")
    summary = data.summaries["train"]
    assert (summary.rows, summary.kept, summary.truncated, summary.empty) == (30, 29, 1, 1)
    assert summary.empty_rows == ["line 31"]
    assert summary.label_tokens == 29 * 2
    assert 30 not in _rows(data.train_dataloader())
    assert "dropped without labels (line 31)" in str(summary)


def test_an_empty_answer_is_a_row_without_labels(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    rows = [{"instruction": "a", "output": "b"}] * 30 + [{"instruction": "a", "output": " "}]
    data = Alpaca(source=write("a.jsonl", rows), tokenizer=bpe(), validation_size=1, split_seed=1)
    data.setup("fit")
    assert data.summaries["train"].empty_rows == ["line 31"]


def test_predicting_pads_prompts_at_the_left_and_keeps_their_end(
    bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    tokenizer = bpe(bos=True)
    rows = [{"instruction": row["instruction"], "input": row["input"]} for row in ROWS]
    rows[2]["input"] = "word " * 300
    source = write("p.json", rows)
    data = Instructions(source=source, predict_source=source, tokenizer=tokenizer, max_length=150)
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "row"}
    assert batch["row"].tolist() == list(range(8))
    for index, mask in enumerate(batch["attention_mask"]):
        ids = batch["input_ids"][index][mask.bool()]
        assert torch.equal(mask, mask.sort().values), "padding stands at the left"
        text = tokenizer.decode(ids)
        assert text.startswith("<s>")
        assert text.endswith("### Response:\n")
        if index != 2:
            assert text == "<s>" + _prompt(rows[index])
    assert data.summaries["predict"].truncated == 1


def test_the_templates_are_filled_in_one_pass(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    row = {"instruction": "{input} {instruction}", "input": "{instruction}", "output": "ok"}
    data = Instructions(
        source=write("a.json", [row, row]),
        tokenizer=bpe(),
        validation_size=1,
        template='{"q": "{instruction}", "i": "{input}"} ',
    )
    data.setup("fit")
    ids = next(iter(data.train_dataloader()))["input_ids"][0]
    assert data.tokenizer.decode(ids) == '{"q": "{input} {instruction}", "i": "{instruction}"} ok</s>'


@pytest.mark.parametrize("sample", ["instructions", "quotes"])
def test_the_samples_that_come_with_the_package(bpe: Callable[..., Any], sample: str) -> None:
    kind = {"instructions": Instructions, "quotes": PlainText}[sample]
    columns = {"text": "quote"} if sample == "quotes" else {}
    data = kind(source=f"sample:{sample}", columns=columns, tokenizer=bpe(), max_length=2000)
    data.setup("fit")
    assert data.summaries["train"].kept == data.summaries["train"].rows > 10


def test_real_instructions_read_back_as_their_answers(bpe: Callable[..., Any], real_data: Path) -> None:
    import json

    source = real_data / "alpaca_800.json"
    rows = json.loads(source.read_text())
    data = Instructions(source=str(source), tokenizer=bpe(), max_length=20_000, batch_size=64)
    data.setup("fit")
    both = _rows(data.train_dataloader()) | _rows(data.val_dataloader())
    assert len(both) == 800
    for number, row in both.items():
        assert data.tokenizer.decode(row["labels"][row["labels"] != -100]) == rows[number]["output"] + "</s>"
