"""Which rows serve which stage."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from peftlight.data import SST2, PlainText, TextClassification
from peftlight.data.reading import read_file
from peftlight.errors import UserError

ROWS = [{"text": f"film {place}", "label": place % 2} for place in range(40)]
UNKNOWN = [{"text": "film", "label": -1}, {"text": "fox", "label": -1}]


def _numbers(data: Any, role: str) -> list[int]:
    loaders = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
    loaders["predict"] = data.predict_dataloader
    return sorted(row for batch in loaders[role]() for row in batch["row"].tolist())


def test_the_rows_set_aside_depend_on_the_seed_alone(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    source = write("a.json", ROWS)

    def aside(seed: int, size: int | float = 0.25, globally: int = 0) -> list[int]:
        random.seed(globally)
        np.random.seed(globally)
        torch.manual_seed(globally)
        data = PlainText(source=source, tokenizer=bpe(), split_seed=seed, validation_size=size)
        data.setup("fit")
        train, validation = _numbers(data, "train"), _numbers(data, "validation")
        assert sorted(train + validation) == list(range(40))
        return validation

    assert len(aside(1)) == 10
    assert aside(1) == aside(1, globally=7)
    assert aside(1) == aside(1, size=10)
    assert aside(1) != aside(2)


@pytest.mark.parametrize("ending", ["validation", "valid", "val", "dev"])
def test_a_folder_assigns_files_by_their_names(
    bpe: Callable[..., Any], write: Callable[..., str], tmp_path: Path, ending: str
) -> None:
    write("d/my_train-00000-of-00002.json", ROWS[:3])
    write("d/my_train-00001-of-00002.json", ROWS[3:5])
    write(f"d/{ending}.jsonl", ROWS[:2])
    write("d/my-test.parquet", ROWS[:4])
    write("d/README.md", "notes")
    data = TextClassification(source=str(tmp_path / "d"), tokenizer=bpe())
    data.setup()
    assert {role: summary.rows for role, summary in data.summaries.items()} == {
        "train": 5,
        "validation": 2,
        "test": 4,
        "predict": 4,
    }
    assert _numbers(data, "train") == [0, 1, 2, 3, 4]


def test_files_without_a_split_in_their_names_are_all_for_training(
    bpe: Callable[..., Any], write: Callable[..., str], tmp_path: Path
) -> None:
    for name in ("latest.json", "more.json"):
        write(name, ROWS[:4])
    data = PlainText(source=str(tmp_path / "*.json"), tokenizer=bpe(), validation_size=2)
    data.setup("fit")
    assert data.summaries["train"].rows == 6


def test_sources_of_their_own_come_first(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    data = TextClassification(
        source=write("a.json", ROWS),
        validation_source=write("b.json", ROWS[:7]),
        test_source=write("c.json", ROWS[:5]),
        predict_source=write("d.jsonl", [{"text": "no label here"}]),
        tokenizer=bpe(),
    )
    data.setup()
    assert [data.summaries[role].rows for role in ("train", "validation", "test", "predict")] == [40, 7, 5, 1]
    assert "labels" in next(iter(data.test_dataloader()))
    assert "labels" not in next(iter(data.predict_dataloader()))


def test_fewer_rows_to_predict_than_processes_are_refused(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    data = TextClassification(source=write("a.json", ROWS), predict_source=write("b.json", ROWS[:3]), tokenizer=bpe())
    data.setup()
    data.trainer = Trainer(accelerator="cpu", devices=3, logger=False, enable_checkpointing=False)
    assert len(data.predict_dataloader().dataset) == 3  # type: ignore[arg-type]
    data.trainer = Trainer(accelerator="cpu", devices=4, logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match="Each of the 4 processes needs a row to predict, and rows there are 3"):
        data.predict_dataloader()


def test_an_unlabelled_test_split_is_for_predicting_and_validation_is_tested(
    bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    for test in (write("u.json", UNKNOWN), write("n.json", [{"text": "a"}, {"text": "b"}])):
        source = write("a.json", ROWS)
        data = TextClassification(source=source, test_source=test, tokenizer=bpe(), labels=["bad", "good"])
        with pytest.warns(UserWarning, match="test uses the validation split"):
            data.setup("test")
        tested = _numbers(data, "test")
        data.setup("validate")
        assert tested == _numbers(data, "validation")
        data.setup("predict")
        assert _numbers(data, "predict") == [0, 1]


def test_the_fingerprint_follows_the_content_in_use(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    def fingerprint(rows: list[Any] = ROWS, **fields: Any) -> str:
        data = PlainText(source=write("a.json", rows), tokenizer=bpe(), **fields)
        data.setup("fit")
        return data.fingerprint

    first = fingerprint()
    assert first == fingerprint(batch_size=2)
    others = {fingerprint(ROWS[:-1]), fingerprint(split_seed=1), fingerprint(validation_source=write("v.json", ROWS))}
    assert len(others - {first}) == 3


def test_text_pairs_have_token_types(minilm: str, write: Callable[..., str]) -> None:
    rows = [{"text": "the film", "text_pair": "the long film", "label": place % 2} for place in range(8)]
    rows.append({"text": "a", "text_pair": "b", "label": 0})
    source = write("a.json", rows)
    data = TextClassification(source=source, tokenizer=minilm, validation_source=source, max_length=7)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    one = data.tokenizer("the film", "the long film", truncation=True, max_length=7)
    assert batch["input_ids"][0].tolist() == one["input_ids"]
    assert batch["token_type_ids"][0].tolist() == one["token_type_ids"]
    assert data.summaries["validation"].longest == 8
    single = TextClassification(source=write("b.json", ROWS), tokenizer=minilm)
    single.setup("fit")
    assert "token_type_ids" not in next(iter(single.train_dataloader()))


def test_long_texts_are_cut_as_the_tokenizer_cuts_them(minilm: str, write: Callable[..., str]) -> None:
    rows = [{"text": str(count) + " word" * count, "label": count % 2} for count in (30, 3, 1, 9, 20)]
    source = write("a.json", rows)
    data = TextClassification(source=source, validation_source=source, tokenizer=minilm, max_length=12)
    data.setup("validate")
    (batch,) = data.val_dataloader()
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        assert ids[mask].tolist() == data.tokenizer(row["text"], truncation=True, max_length=12)["input_ids"]
    assert (data.summaries["validation"].truncated, data.summaries["validation"].longest) == (2, 33)


def test_numbers_as_label_names_are_names(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    rows = [{"text": "a", "label": stars} for stars in (5, 1, 3, 2, 4, 1)]
    labels = ["1", "2", "3", "4", "5"]
    data = TextClassification(source=write("a.json", rows), tokenizer=bpe(), labels=labels, validation_size=1)
    data.setup("fit")
    for batch in data.train_dataloader():
        for row, label in zip(batch["row"].tolist(), batch["labels"].tolist(), strict=True):
            assert labels[label] == str(rows[row]["label"])


def test_every_format_reads_alike(write: Callable[..., str]) -> None:
    rows = [{"text": 'a "quoted" film', "label": "1"}, {"text": "\u201cthe fox\u201d \u2028 x", "label": "0"}]
    lines = "\n".join(f"{row['text']}\t{row['label']}" for row in rows)
    comma = "\r\n".join('"' + row["text"].replace('"', '""') + '",' + row["label"] for row in rows)
    paths = [
        write("a.json", rows),
        write("b.json", {"data": rows}),
        write("a.jsonl", rows),
        write("a.parquet", rows),
        write("a.tsv", "\ufefftext\tlabel\n" + lines + "\n"),
        write("a.csv", "\ufefftext,label\r\n" + comma),
    ]
    for path in paths:
        table = read_file(path)
        assert table.columns == ["text", "label"]
        assert [table.cells(column) for column in table.columns] == [
            [row[column] for row in rows] for column in ("text", "label")
        ]


def test_a_cell_over_several_lines_is_numbered_by_its_first(write: Callable[..., str]) -> None:
    table = read_file(write("a.csv", 'text,label\n"a\nb\n",1\n\nc,0\n'))
    assert list(table.numbers) == [2, 6]


def test_hub_splits_serve_by_their_names(bpe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows(count: int, unknown: bool = False) -> dict[str, list[Any]]:
        labels = [-1 if unknown else place % 2 for place in range(count)]
        return {"idx": list(range(count)), "sentence": [f"film {place}" for place in range(count)], "label": labels}

    splits = {"train": rows(9), "validation": rows(4), "test": rows(3, unknown=True)}
    loaded = datasets.DatasetDict({name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda source, subset: loaded)
    data = SST2(tokenizer=bpe())
    with pytest.warns(UserWarning, match="stanfordnlp/sst2 .test. is -1"):
        data.setup()
    assert [data.summaries[role].rows for role in ("train", "validation", "test", "predict")] == [9, 4, 4, 3]
    first = data.fingerprint
    loaded["train"] = datasets.Dataset.from_dict(rows(8))
    with pytest.warns(UserWarning, match="test uses the validation split"):
        data.setup()
    assert data.fingerprint != first


@pytest.mark.slow
def test_sst2_from_its_files(minilm: str, real_data: Path) -> None:
    data = SST2(source=str(real_data / "sst2_*.tsv"), tokenizer=minilm, batch_size=256)
    data.setup("fit")
    assert [data.summaries[role].kept for role in ("train", "validation")] == [67_349, 872]
    lines = (real_data / "sst2_validation.tsv").read_text(encoding="utf-8").split("\n")[1:]
    for batch in data.val_dataloader():
        for row, ids, label in zip(batch["row"].tolist(), batch["input_ids"], batch["labels"].tolist(), strict=True):
            text, expected = lines[row].split("\t")
            assert label == int(expected)
            real = ids[ids != data.tokenizer.pad_token_id].tolist()
            assert real == data.tokenizer(text)["input_ids"]
    with pytest.warns(UserWarning, match="has no column 'label'"):
        data.setup("test")
    assert data.summaries["test"].kept == 872
    data.setup("predict")
    assert data.summaries["predict"].kept == 1_821


@pytest.mark.slow
def test_quotes_from_their_file(bpe: Callable[..., Any], real_data: Path) -> None:
    from peftlight.data import EnglishQuotes

    data = EnglishQuotes(source=str(real_data / "quotes_1800.jsonl"), tokenizer=bpe(), max_length=2000)
    data.setup("fit")
    assert data.summaries["train"].rows + data.summaries["validation"].rows == 1_800
