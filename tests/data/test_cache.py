"""Tokens are made once and found again by everything that they depend on, and by nothing else."""

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftlight.data import Instructions, TextClassification
from peftlight.data.encoder import Encoder
from peftlight.data.sources import Split
from peftlight.errors import UserError

ROWS = [{"instruction": f"Name {place}", "output": f"{place} it is"} for place in range(40)]


def _files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tokens").iterdir())


def _contents(data: Any) -> dict[str, Any]:
    data.setup("fit")
    loaders = {"train": data.train_dataloader(), "validation": data.val_dataloader()}
    rows = {
        role: {item["row"]: (item["input_ids"].tolist(), item["labels"].tolist()) for item in loader.dataset}
        for role, loader in loaders.items()
    }
    return {"rows": rows, "summaries": data.summaries, "fingerprint": data.fingerprint}


def test_the_second_setup_neither_reads_nor_tokenizes(
    bpe: Callable[..., Any], write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, tokenizer = write("a.jsonl", ROWS), bpe()
    data = Instructions(source=source, tokenizer=tokenizer)
    data.prepare_data()

    def never(*_: Any) -> None:
        raise AssertionError("the rows are in the cache")

    first = _contents(Instructions(source=source, tokenizer=tokenizer))
    monkeypatch.setattr(Encoder, "encode", never)
    monkeypatch.setattr(Split, "read", never)
    assert _contents(data) == first
    assert _contents(Instructions(source=source, tokenizer=tokenizer)) == first


def test_what_tokens_depend_on_changes_the_file(
    bpe: Callable[..., Any], write: Callable[..., str], tmp_path: Path
) -> None:
    source, tokenizer = write("a.jsonl", ROWS), bpe()

    def files(source: str = source, tokenizer: Any = tokenizer, **fields: Any) -> int:
        Instructions(source=source, tokenizer=tokenizer, **fields).setup("fit")
        return len(_files(tmp_path))

    assert files() == 1
    assert files(batch_size=3, validation_size=9, split_seed=1, max_empty=0.5) == 1
    assert files(source=write("copy.jsonl", ROWS)) == 1, "the content counts, not the name"
    assert files(max_length=900) == 2
    assert files(template_without_input="Q: {instruction} A: ") == 3
    assert files(tokenizer=bpe(bos=True)) == 4
    assert files(tokenizer=bpe(template="{{ messages }}")) == 5
    assert files(source=write("a.jsonl", [*ROWS, ROWS[0]])) == 6
    tokenizer("a", truncation=True, max_length=3, padding="max_length")
    assert files(source=write("a.jsonl", ROWS)) == 6, "the tokenizer's last call does not count"


@pytest.mark.parametrize("damage", ["cut", "bits", "text"])
def test_a_damaged_file_is_made_again(
    bpe: Callable[..., Any], write: Callable[..., str], tmp_path: Path, damage: str
) -> None:
    data = Instructions(source=write("a.jsonl", ROWS), tokenizer=bpe())
    first = _contents(data)
    (file,) = _files(tmp_path)
    whole = file.read_bytes()
    damaged = {"cut": whole[:-100], "bits": whole[:-1] + bytes([whole[-1] ^ 1]), "text": b"not tokens"}
    file.write_bytes(damaged[damage])
    with pytest.warns(UserWarning, match="damaged"):
        again = _contents(data)
    assert again == first
    assert file.read_bytes() == whole


def test_the_file_says_what_it_holds(bpe: Callable[..., Any], write: Callable[..., str], tmp_path: Path) -> None:
    import json

    from safetensors import safe_open

    Instructions(source=write("a.jsonl", ROWS), tokenizer=bpe()).setup("fit")
    with safe_open(_files(tmp_path)[0], framework="numpy") as file:
        summary = json.loads(file.metadata()["peftlight"])["summary"]
    assert (summary["rows"], summary["kept"], summary["empty"]) == (40, 40, 0)


def test_other_label_names_are_other_tokens(bpe: Callable[..., Any], write: Callable[..., str], tmp_path: Path) -> None:
    source = write("a.csv", "text,label\na,yes\nb,no\nc,yes\n")
    for labels in (None, ["no", "yes"], ["yes", "no"]):
        data = TextClassification(source=source, tokenizer=bpe(), labels=labels, validation_size=1)
        data.setup("fit")
        assert data.label_names == (labels or ["no", "yes"])
    assert len(_files(tmp_path)) == 3


def test_a_cache_that_cannot_be_written_names_the_option(
    bpe: Callable[..., Any], write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = write("a.jsonl", ROWS)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"(?s)No room.*--data\.cache_dir"):
        Instructions(source=source, tokenizer=bpe()).setup("fit")


def test_the_same_bytes_are_other_rows_in_another_kind_of_file(
    bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    content = json.dumps([{"text": "a", "label": place % 2} for place in range(4)])
    TextClassification(source=write("a.json", content), tokenizer=bpe()).setup("fit")
    with pytest.raises(UserError, match="line 1: the row is a list"):
        TextClassification(source=write("a.jsonl", content), tokenizer=bpe()).setup("fit")
