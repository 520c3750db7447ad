"""Which token carries a word's tag, in every kind of tokenizer, and what is refused."""

import random
from collections.abc import Callable
from typing import Any

import pytest

from peftlight.data import CoNLL2003, TaggedWords
from peftlight.data.token_classification import first_pieces
from peftlight.errors import UserError

ROWS = [
    {"tokens": ["Ines", "Petrov", "left", "Oslo", "."], "tags": ["B-PER", "I-PER", "O", "B-LOC", "O"]},
    {"tokens": ["nothing", "here"], "tags": ["O", "O"]},
    {"tokens": ["the", "quick-brown", "fox's", "jumps"], "tags": ["O", "B-ORG", "I-ORG", "O"]},
    {"tokens": ["Oslo"], "tags": ["B-LOC"]},
]
NAMES = ["B-LOC", "B-ORG", "B-PER", "I-ORG", "I-PER", "O"]


def items(data: Any, *roles: str) -> dict[int, Any]:
    """The rows of the roles by their numbers, as the data set gives them."""
    loaders = {"train": data.train_dataloader, "validation": data.val_dataloader, "predict": data.predict_dataloader}
    return {item["row"]: item for role in roles for item in loaders[role]().dataset}


def fitted(source: str, tokenizer: Any, **fields: Any) -> TaggedWords:
    data = TaggedWords(source=source, tokenizer=tokenizer, **{"validation_size": 1, **fields})
    data.setup("fit")
    return data


def labelled(item: Any, names: list[str]) -> list[tuple[int, str]]:
    """Place and tag of each token that carries one."""
    return [(place, names[label]) for place, label in enumerate(item["labels"].tolist()) if label != -100]


def random_rows(count: int, letters: str) -> list[dict[str, Any]]:
    draw = random.Random(0)
    words = [["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(draw.randint(1, 12))]
             for _ in range(count)]  # fmt: skip
    return [{"tokens": row, "tags": [draw.choice(NAMES) for _ in row]} for row in words]


def test_the_first_pieces_of_a_real_tokenizer_are_those_of_its_word_ids(minilm: str, write: Callable[..., str]) -> None:
    """WordPiece knows words already split; where it drops one, such as a zero-width space, no token has its tag."""
    rows = [*ROWS, *random_rows(150, "aeinrst.-'é中\u200b\U0001f3ac7")]
    rows += [{"tokens": ["a", "\u200b", "b"], "tags": ["O", "B-PER", "I-PER"]}]
    data = fitted(write("a.jsonl", rows), minilm, labels=NAMES)
    both = items(data, "train", "validation")
    assert len(both) == len(rows)
    for number, row in enumerate(rows):
        split = data.tokenizer(row["tokens"], is_split_into_words=True)
        first = {word: place for place, word in reversed(list(enumerate(split.word_ids()))) if word is not None}
        assert both[number]["input_ids"].tolist() == split["input_ids"]
        assert labelled(both[number], NAMES) == [(place, row["tags"][word]) for word, place in sorted(first.items())]


@pytest.mark.parametrize("variant", [{}, {"trims": True}, {"bos": True}, {"bos": True, "trims": True}])
def test_pieces_of_byte_level_tokenizers_spell_the_words(
    variant: dict[str, bool], bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    """From a word's labelled piece up to the next labelled piece the tokens spell that word."""
    rows = [*ROWS, *random_rows(150, "aeinrst.-'é中\U0001f3ac7")]
    data = fitted(write("a.jsonl", rows), bpe(**variant), labels=NAMES)
    both = items(data, "train", "validation")
    for number, row in enumerate(rows):
        item, marks = both[number], labelled(both[number], NAMES)
        assert [tag for _, tag in marks] == row["tags"]
        ends = [place for place, _ in marks[1:]] + [len(item["input_ids"])]
        for word, (place, _), end in zip(row["tokens"], marks, ends, strict=True):
            assert data.tokenizer.decode(item["input_ids"][place:end]).strip() == word


def test_a_byte_level_tokenizer_meets_words_as_in_running_text(trained_bpe: str, write: Callable[..., str]) -> None:
    """As RoBERTa's tokenizer does with add_prefix_space, the one way in which it takes words already split."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer.from_str(trained_bpe)
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>")
    rows = [*ROWS, *random_rows(50, "aeinrst.-'")]
    both = items(fitted(write("a.jsonl", rows), tokenizer, labels=NAMES), "train", "validation")
    for number, row in enumerate(rows):
        expected = tokenizer(row["tokens"], is_split_into_words=True)["input_ids"]
        assert both[number]["input_ids"].tolist() == expected


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(0, 0), (0, 2), (2, 3), (4, 5), (0, 0)], [-100, 0, -100, 1, -100]),  # special tokens around, a word in two
        ([(0, 3), (3, 4), (4, 5)], [0, -100, 1]),  # a space on its own
        ([(0, 3), (3, 5)], [0, 1]),  # a space in the first piece of its word
        ([(0, 3), (4, 4), (4, 5)], [0, -100, 1]),  # a space that counts as nothing
        ([(0, 5)], [0]),  # a token over two words
        ([(0, 3), (5, 6)], [0, -100]),  # a token behind the words
    ],
)
def test_the_first_piece_follows_from_characters(spans: list[tuple[int, int]], expected: list[int]) -> None:
    assert first_pieces(["new", "y"], spans).tolist() == expected


def test_what_is_too_long_is_cut_and_counted(minilm: str, write: Callable[..., str]) -> None:
    rows = [{"tokens": ["film"] * length, "tags": ["B-X", "O"] * (length // 2)} for length in (4, 6, 8, 30)]
    data = fitted(write("a.jsonl", rows), minilm, max_length=8, validation_source=write("b.jsonl", rows[:1]))
    summary = data.summaries["train"]
    assert (summary.truncated, summary.longest, summary.label_tokens) == (2, 32, 4 + 6 + 6 + 6)
    assert data.label_names == ["B-X", "O"]
    for row, item in items(data, "train").items():
        kept = min(len(rows[row]["tokens"]), 6)
        assert item["labels"].tolist() == [-100, *([0, 1] * 3)[:kept], -100]


def test_rows_without_words_are_counted_and_left_out(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    rows = [*ROWS * 10, {"tokens": [], "tags": []}]
    data = fitted(write("a.jsonl", rows), bpe(bos=True), validation_source=write("b.jsonl", ROWS))
    assert data.summaries["train"].empty_rows == ["line 41"]
    assert sorted(items(data, "train")) == list(range(40))


def test_a_batch_pads_tags_with_what_is_ignored(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    data = fitted(write("a.jsonl", ROWS), bpe(), validation_source=write("b.jsonl", ROWS))
    (batch,) = data.val_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "row", "labels"}
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert (batch["labels"] != -100).sum(1).tolist() == [5, 2, 4, 1]


def test_numbers_are_tags_as_well_as_names(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    named = fitted(write("a.jsonl", ROWS), bpe())
    numbered = [{**row, "tags": [NAMES.index(tag) for tag in row["tags"]]} for row in ROWS]
    counted = fitted(write("b.json", numbered), bpe(), labels=NAMES)
    assert named.label_names == counted.label_names == NAMES
    one, other = items(named, "train", "validation"), items(counted, "train", "validation")
    assert all(one[row]["labels"].tolist() == other[row]["labels"].tolist() for row in range(4))
    assert fitted(write("b.json", numbered), bpe()).label_names == list("012345")


def test_names_that_a_hub_file_carries_are_used(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features({"tokens": List(Value("string")), "tags": List(ClassLabel(names=NAMES))})
    path = write("a.parquet", [{"a": 1}])
    Dataset.from_list(ROWS, features=features).to_parquet(path)
    data = fitted(path, bpe())
    assert data.label_names == NAMES
    assert [tag for _, tag in labelled(items(data, "train", "validation")[0], NAMES)] == ROWS[0]["tags"]


def test_predicting_keeps_the_words_and_says_where_they_begin(minilm: str, write: Callable[..., str]) -> None:
    rows = [{"tokens": row["tokens"]} for row in ROWS]
    data = TaggedWords(source=write("a.jsonl", ROWS), predict_source=write("p.jsonl", rows), tokenizer=minilm,
                       max_length=6)  # fmt: skip
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert set(batch) == {"input_ids", "attention_mask", "row", "words"}
    assert [data.words_of(row) for row in batch["row"].tolist()] == [row["tokens"] for row in ROWS]
    begins = [[word for word in row if word >= 0] for row in batch["words"].tolist()]
    assert begins == [[0, 1], [0, 1], [0, 1], [0]]  # Ines and Petrov, quick-brown too, have several pieces
    data.predict_source = write("q.jsonl", rows[1:])
    data.setup("predict")
    assert data.words_of(0) == ROWS[1]["tokens"]


def test_an_unlabelled_test_split_is_for_predicting(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    for test in ([{"tokens": ["a", "b"]}], [{"tokens": ["a", "b"], "tags": [-1, -1]}]):
        data = TaggedWords(source=write("a.jsonl", ROWS), test_source=write("t.jsonl", test), tokenizer=bpe())
        with pytest.warns(UserWarning, match="test uses the validation split"):
            data.setup("test")


CONLL = "-DOCSTART- -X- O\n\nInes NNP B-PER\nPetrov NNP I-PER\nleft VBD O\nOslo NNP B-LOC\n. . O\n\n\nnothing NN O\n" \
        "here RB O\n"  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        CONLL,
        CONLL.replace("\n", "\r\n"),
        CONLL.replace(" ", "\t"),
        CONLL.replace(" ", "\t").replace("\n", "\r\n"),
        CONLL.replace(" ", "   ").rstrip("\n"),
        "\ufeff" + CONLL.replace("-DOCSTART- -X- O\n\n", ""),
    ],
)
def test_files_in_conlls_format_hold_the_rows_of_the_others(
    text: str, bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    expected = items(fitted(write("a.jsonl", ROWS[:2]), bpe(), max_empty=1), "train", "validation")
    found = fitted(write("a.conll", text), bpe(), max_empty=1)
    assert found.label_names == ["B-LOC", "B-PER", "I-PER", "O"]
    for row, item in items(found, "train", "validation").items():
        assert item["input_ids"].tolist() == expected[row]["input_ids"].tolist()
        assert item["labels"].tolist() == expected[row]["labels"].tolist()


def test_a_tab_leaves_spaces_in_words_and_a_file_of_words_is_to_predict(
    bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    source = write("a.conll", "New York\tB-LOC\nfell\tO\n\nNew York\tB-LOC\n")
    data = TaggedWords(source=source, predict_source=write("p.conll", "New\r\nYork \r\n"), tokenizer=bpe())
    data.setup("predict")
    assert data.words_of(0) == ["New", "York"]
    data.predict_source = source
    data.setup("predict")
    assert data.words_of(0) == ["New York", "fell"]


def test_the_sample_that_comes_with_the_package(bpe: Callable[..., Any]) -> None:
    data = CoNLL2003(source="sample:entities", tokenizer=bpe(), max_length=300)
    data.setup("fit")
    assert data.summaries["train"].kept == data.summaries["train"].rows > 150
    assert data.label_names == ["O", *(f"{at}-{kind}" for kind in ("PER", "ORG", "LOC", "MISC") for at in "BI")]
    used = {int(label) for item in items(data, "train").values() for label in item["labels"]}
    assert used == {-100, 0, 1, 2, 3, 4, 5, 6}


def rows_with(**cells: Any) -> list[dict[str, Any]]:
    return [ROWS[0], {**ROWS[1], **cells}]


BAD: dict[str, tuple[str, Any, dict[str, Any], list[str]]] = {
    "fewer tags": ("a.jsonl", rows_with(tags=["O"]), {}, ["a.jsonl, line 2", "2 words, but 1 tags in 'tags'"]),
    "a text for words": ("a.jsonl", rows_with(tokens="a b"), {}, ["a.jsonl, line 2", "'a b' (str)", "a list"]),
    "a text for tags": ("a.csv", "tokens,tags\na b,O O\n", {}, ["a.csv, line 2", "'O O' (str)", "a list"]),
    "no list": ("a.jsonl", rows_with(tags=None), {}, ["a.jsonl, line 2", "'tags' is null"]),
    "not a word": ("a.json", rows_with(tokens=["a", 3]), {}, ["a.json, row 2", "word 2 of 'tokens' is 3 (int)"]),
    "empty word": ("a.json", rows_with(tokens=["a", " "]), {}, ["a.json, row 2", "word 2", "not empty"]),
    "no tag": ("a.json", rows_with(tags=["O", None]), {}, ["a.json, row 2, word 2", "'tags' is null"]),
    "not a tag": ("a.json", rows_with(tags=["O", 1.5]), {}, ["a.json, row 2, word 2", "1.5 (float)"]),
    "unknown tag": (
        "a.json", rows_with(tags=["O", "B-PERS"]), {"labels": NAMES},
        ["a.json, row 2, word 2", "unknown label 'B-PERS'", "Did you mean 'B-PER'"],
    ),
    "tag out of range": (
        "a.json", rows_with(tags=["O", 6]), {"labels": NAMES},
        ["a.json, row 2, word 2", "label 6 is outside the range 0 to 5"],
    ),
    "no words": ("a.json", [{"tokens": [], "tags": []}], {}, ["a.json has no words"]),
    "one tag": ("a.json", ROWS[1:2], {}, ["a.json: every row has the label 'O'"]),
    "columns": (
        "a.json", [{"words": ["a"], "ner": ["O"]}], {},
        ["no column 'tokens' and no column 'tags'", "columns: {tokens: words, tags: ner}"],
    ),
    "CoNLL cells": ("a.conll", "a O\nb X O\n", {}, ["a.conll, line 2", "3 cells", "before have 2", "blank line"]),
    "CoNLL tag": ("a.conll", "a\tO\nb\tO\n\nc\tX\nd\t\n", {}, ["a.conll, line 4, word 2", "'tags' is empty"]),
    "CoNLL without words": ("a.conll", "-DOCSTART- O\n", {}, ["a.conll has no rows"]),
    "all cut": ("a.json", ROWS[:1], {"max_length": 4}, ["a.json", "max_length=4", "longest"]),
    "label names": ("a.json", ROWS, {"labels": ["O"]}, ["labels", "two"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_refused_with_file_row_and_word(
    case: str, bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    name, content, fields, parts = BAD[case]
    with pytest.raises(UserError) as error:
        fitted(write(name, content), bpe(), **fields)
    for part in parts:
        assert part in str(error.value)
