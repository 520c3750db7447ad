"""Sources and targets for encoder-decoders: compared with the tokenizer's own tokens, cut, cached, and read back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peftlight.data
from peftlight.data import InstructionPairs, SourceTarget
from peftlight.data.instructions import WITH_INPUT, WITHOUT_INPUT
from peftlight.errors import UserError

ROWS = [
    {"source": f"the film {'is long ' * (place % 4)}", "target": f"film {'journey ' * (place % 3)}{place}"}
    for place in range(12)
]
FRAMES = {"plain": "", "T5": "$A </s>", "BART": "<s> $A </s>"}


@pytest.fixture
def framing(trained_bpe: str) -> Callable[[str], Any]:
    """A tokenizer that puts special tokens around a text as that model's does."""

    def make(name: str) -> Any:
        from tokenizers import Tokenizer, processors
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer.from_str(trained_bpe)
        if FRAMES[name]:
            special = [("<s>", 0), ("</s>", 1)]
            tokenizer.post_processor = processors.TemplateProcessing(single=FRAMES[name], special_tokens=special)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", pad_token="<pad>")

    return make


def _rows(*loaders: Any) -> dict[int, dict[str, Tensor]]:
    """Each row by its number, without its padding."""
    rows = {}
    for loader in loaders:
        for batch in loader:
            for index, number in enumerate(batch["row"].tolist()):
                labels = batch["labels"][index]
                source = batch["input_ids"][index][batch["attention_mask"][index].bool()]
                rows[number] = {"source": source, "target": labels[labels != -100]}
    return rows


@pytest.mark.parametrize("name", FRAMES)
def test_source_and_target_are_the_tokenizers_and_the_target_ends(
    name: str, framing: Callable[[str], Any], write: Callable[..., str]
) -> None:
    tokenizer = framing(name)
    data = SourceTarget(
        source=write("a.jsonl", ROWS), tokenizer=tokenizer, prefix="film: ", validation_size=3, batch_size=5
    )
    data.setup("fit")
    rows = _rows(data.train_dataloader(), data.val_dataloader())
    assert sorted(rows) == list(range(12))
    for number, row in rows.items():
        target = tokenizer(ROWS[number]["target"])["input_ids"]
        assert row["source"].tolist() == tokenizer("film: " + ROWS[number]["source"])["input_ids"]
        assert row["target"].tolist() == (target if name != "plain" else [*target, tokenizer.eos_token_id])
        assert row["target"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row["target"], skip_special_tokens=True) == ROWS[number]["target"]


def test_padding_stands_at_the_right_and_labels_are_padded_apart(
    framing: Callable[[str], Any], write: Callable[..., str]
) -> None:
    rows = [{"source": "film " * 9, "target": "a"}, {"source": "film", "target": "journey " * 5}]
    source = write("a.jsonl", rows)
    data = SourceTarget(source=source, validation_source=source, tokenizer=framing("T5"))
    data.setup("validate")
    (batch,) = data.val_dataloader()
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    assert ids.shape == mask.shape != labels.shape
    assert torch.equal(mask, mask.sort(descending=True).values)
    assert mask[1].sum() < mask.shape[1] == mask[0].sum()
    assert (ids[mask == 0] == data.tokenizer.pad_token_id).all()
    assert (labels[0] == -100).sum() > 0
    assert labels[0][-1] == -100 != labels[1][-1]


@pytest.mark.parametrize("name", FRAMES)
def test_what_is_too_long_is_cut_counted_and_still_ends(
    name: str, framing: Callable[[str], Any], write: Callable[..., str]
) -> None:
    long = {"source": "film " * 30, "target": "journey " * 30}
    tokenizer = framing(name)
    data = SourceTarget(source=write("a.jsonl", [*ROWS, long]), tokenizer=tokenizer, validation_size=1, split_seed=1,
                        max_length=25, max_target_length=20)  # fmt: skip
    data.setup("fit")
    row = _rows(data.train_dataloader(), data.val_dataloader())[12]
    assert (len(row["source"]), len(row["target"])) == (25, 20)
    assert row["target"][-1] == tokenizer.eos_token_id
    summary = data.summaries["train"]
    whole = len(tokenizer(long["target"])["input_ids"]) + (name == "plain")
    assert (summary.truncated, summary.truncated_targets, summary.longest_target) == (1, 1, whole)
    assert summary.label_tokens == sum(len(found["target"]) for found in _rows(data.train_dataloader()).values())
    assert "1 truncated" in str(summary)
    assert "1 targets truncated" in str(summary)


def test_an_empty_target_is_dropped_and_named(framing: Callable[[str], Any], write: Callable[..., str]) -> None:
    rows = [*ROWS, *ROWS, {"source": "film", "target": " "}]
    data = SourceTarget(source=write("a.jsonl", rows), tokenizer=framing("T5"), validation_size=1, split_seed=1)
    data.setup("fit")
    assert data.summaries["train"].empty_rows == ["line 25"]
    assert 24 not in _rows(data.train_dataloader(), data.val_dataloader())


def test_to_predict_only_sources_are_read(framing: Callable[[str], Any], write: Callable[..., str]) -> None:
    tokenizer = framing("T5")
    source = write("p.jsonl", [{"source": row["source"]} for row in ROWS])
    data = SourceTarget(source=source, predict_source=source, tokenizer=tokenizer, prefix="film: ", batch_size=12)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "row"}
    assert torch.equal(batch["attention_mask"], batch["attention_mask"].sort(descending=True).values)
    for number, ids in enumerate(batch["input_ids"]):
        assert (
            ids[batch["attention_mask"][number].bool()].tolist()
            == tokenizer("film: " + ROWS[number]["source"])["input_ids"]
        )


def test_a_test_split_without_targets_gives_way_to_validation(
    framing: Callable[[str], Any], write: Callable[..., str]
) -> None:
    test = write("t.jsonl", [{"source": "film"}])
    data = SourceTarget(source=write("a.jsonl", ROWS), test_source=test, tokenizer=framing("T5"), validation_size=4)
    with pytest.warns(UserWarning, match=r"no labels.*'target'"):
        data.setup("test")
    assert data.summaries["test"].kept == 4


def test_the_cache_knows_what_sources_and_targets_depend_on(
    framing: Callable[[str], Any], write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokenizer = write("a.jsonl", ROWS), framing("T5")

    def read(**fields: Any) -> dict[int, list[list[int]]]:
        data = SourceTarget(source=source, tokenizer=tokenizer, **fields)
        data.setup("fit")
        rows = _rows(data.train_dataloader(), data.val_dataloader())
        return {number: [row["source"].tolist(), row["target"].tolist()] for number, row in rows.items()}

    def files() -> int:
        return len(list((tmp_path / "cache" / "tokens").iterdir()))

    first = read()
    assert (read(), files()) == (first, 1)
    for count, fields in enumerate([{"prefix": "a "}, {"max_target_length": 7}, {"max_length": 9}], start=2):
        assert read(**fields) != first
        assert files() == count
    monkeypatch.setattr(tokenizer, "tgt_lang", "de_DE", raising=False)
    read()
    assert files() == 5, "the target's language decides what stands around it"


def test_instructions_become_pairs_of_prompt_and_answer(framing: Callable[[str], Any]) -> None:
    path = Path(peftlight.data.__file__).parent / "samples" / "instructions.json"
    wanted = json.loads(path.read_text(encoding="utf-8"))
    data = InstructionPairs(source="sample:instructions", tokenizer=framing("T5"), max_length=900,
                            max_target_length=900, prefix="film: ")  # fmt: skip
    data.setup("fit")
    rows = _rows(data.train_dataloader(), data.val_dataloader())
    assert len(rows) == len(wanted)
    assert {bool(row["input"]) for row in wanted} == {False, True}
    for number, row in rows.items():
        template = WITH_INPUT if wanted[number]["input"] else WITHOUT_INPUT
        prompt = template.format(instruction=wanted[number]["instruction"], input=wanted[number]["input"])
        assert data.tokenizer.decode(row["source"]) == f"film: {prompt}</s>"
        assert data.tokenizer.decode(row["target"]) == f"{wanted[number]['output']}</s>"


def test_targets_that_are_all_cut_are_refused(framing: Callable[[str], Any], write: Callable[..., str]) -> None:
    data = SourceTarget(source=write("a.jsonl", ROWS), tokenizer=framing("T5"), max_target_length=3)
    with pytest.raises(
        UserError, match=r"a\.jsonl: every target is cut; the longest has \d+ tokens.*max_target_length"
    ):
        data.setup("fit")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"dialogue": "a", "summary": "b"}], [
            "no column 'source' and no column 'target'", "columns: {source: dialogue, target: summary}"]),
        ([{"source": "a", "target": "b"}, {"source": "a", "target": None}], ["a.jsonl, line 2", "'target' is null"]),
        ([{"source": "a", "target": "b"}, {"source": "a"}], ["a.jsonl, line 2", "no 'target'"]),
        ([{"source": "a", "target": 3}], ["a.jsonl, line 1", "'target' is 3 (int)"]),
        ([{"source": " ", "target": "b"}], ["a.jsonl, line 1", "'source' is an empty text"]),
    ],
)  # fmt: skip
def test_bad_rows_are_named(
    rows: list[Any], words: list[str], framing: Callable[[str], Any], write: Callable[..., str]
) -> None:
    with pytest.raises(UserError) as error:
        SourceTarget(source=write("a.jsonl", rows), tokenizer=framing("T5")).setup("fit")
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_target_length": 1}, "max_target_length must be at least 2; it is 1"),
        ({"columns": {"taget": "a"}}, "unknown name 'taget'. Did you mean 'target'"),
        ({"max_target_length": 2}, "max_target_length=2 leaves no room for text beside 2 special tokens"),
    ],
)
def test_bad_options_are_named(
    fields: dict[str, Any], words: str, framing: Callable[[str], Any], write: Callable[..., str]
) -> None:
    with pytest.raises(UserError) as error:
        SourceTarget(source=write("a.jsonl", ROWS), tokenizer=framing("BART"), **fields).setup("fit")
    assert words in str(error.value)
