"""Bad data: files that cannot be read, columns, cells, labels, conversations, images."""

import json
import shutil
from pathlib import Path

from bad_inputs.kit import REVIEWS, TASKS
from bad_inputs.row import Row, row

_HEAD = "text,label\n"
_FIT = "fit --config run.yaml --data.source"
_WRITE = "fit --config write.yaml --data.source"
_SEE = "fit --config see.yaml"
_GOOD = {"instruction": "write", "output": "again"}
_TALK = {"messages": [{"role": "user", "content": "write"}, {"role": "assistant", "content": "again"}]}


def _table(name: str, content: str | bytes, *says: str, options: str = "") -> Row:
    return row(name, f"{_FIT} bad.csv {options}".strip(), "bad.csv", *says, files={"bad.csv": content})


def _json(name: str, text: str, *says: str) -> Row:
    return row(name, f"{_WRITE} bad.json", "bad.json", *says, files={"bad.json": text})


def _lines(name: str, second: object, *says: str) -> Row:
    text = second if isinstance(second, str) else json.dumps(second)
    files = {"bad.jsonl": f"{json.dumps(_GOOD)}\n{text}\n"}
    return row(name, f"{_WRITE} bad.jsonl", "bad.jsonl", *says, files=files)


def _talk(name: str, second: object, *says: str) -> Row:
    text = "".join(json.dumps(one) + "\n" for one in (_TALK, {"messages": second}))
    return row(name, f"{_WRITE} talks.jsonl --data Messages", *says, files={"talks.jsonl": text})


def _cut_photo() -> None:
    file = Path("photos/cat/0.png")
    file.write_bytes(file.read_bytes()[:40])


def _without_photos() -> None:
    for file in Path("photos").glob("*/*.png"):
        file.unlink()


FILES = [
    row("a file that is not there", f"{_FIT} review.csv", "no file review.csv", "'reviews.csv'"),
    row("a folder that is not there", f"{_FIT} data/reviews.csv", "the folder data does not exist"),
    row("a folder without data", f"{_FIT} photos/cat", "holds no data file", ".csv"),
    row("a pattern that no file fits", f"{_FIT} 'reviews-*.csv'", "reviews-*.csv", "no data file"),
    row("no such sample", f"{_FIT} sample:sentimant", "'sentimant'", "'sentiment'"),
    row(
        "a kind of file that is not read", f"{_FIT} bad.xlsx", "'.xlsx'", ".parquet", files={"bad.xlsx": b"PK\x03\x04"}
    ),
    row(
        "a file for no split",
        f"{_FIT} mixed",
        "mixed",
        "more.csv",
        "train, validation or test",
        files={"mixed/train.csv": REVIEWS, "mixed/more.csv": REVIEWS},
    ),
    _table("an empty file", "", "is empty"),
    _table("a header alone", _HEAD, "no rows"),
    _table("a file that is not UTF-8", b"text,label\ncaf\xe9,1\n", "line 2", "not UTF-8", "0xe9"),
    _table("a binary file", b"\x89PNG\r\n\x1a\n" + bytes(100), "line 1", "not UTF-8", "0x89"),
    _table("a text in UTF-16", REVIEWS.encode("utf-16-le"), "line 1", "UTF-16", "as UTF-8"),
    _table("a line with too many cells", REVIEWS + "one, two,1\n", "line 10", "3 cells", "text, label", "quotes"),
    _table("quotes that are text", REVIEWS + '"see" again,1\n', "line 10", "not valid CSV", "--data.quoting none"),
    _table("a quote that stays open", REVIEWS + '"and so on,1\n', "line 10", "not valid CSV"),
    _table("a column twice", "text,text\na,1\n", "line 1", "each once", "text, text"),
    row(
        "parquet that is cut off",
        f"{_FIT} bad.parquet",
        "bad.parquet is not a whole parquet file",
        files={"bad.parquet": b"PAR1" + bytes(40)},
    ),
    _json("JSON that is cut off", '[{"instruction": "write", "outp', "line 1", "cut off"),
    _json("JSON Lines called JSON", TASKS, "line 2", "a second object", ".jsonl"),
    _json("JSON without rows", '{"rows": 3}', "keys rows", '{"data": [...]}'),
    _json("JSON that nests without end", "[" * 100_000, "too deep"),
    _lines("a line that is no JSON", '{"instruction": write}', "line 2", "column 17"),
    _lines("a line that is no object", [1, 2], "line 2", "a list", '{"column": value}'),
    row("a hub's data without a network", f"{_FIT} somebody/reviews", "'somebody/reviews'", "--data.source path/to"),
    row("a misspelt folder", f"{_SEE} --data.source fotos", "'fotos'", "'photos'"),
    row("a subset of a file", f"{_FIT} reviews.csv --data.subset english", "'english'", "'reviews.csv' is local"),
]

ROWS_OF_TEXT = [
    _table("columns of other names", "review,stars\na,1\nb,0\n", "'text'", "columns: {text: review, label: stars}"),
    _table(
        "a column that is not there", REVIEWS, "no column 'txt'", "text, label", options="--data.columns '{text: txt}'"
    ),
    row("no such name of ours", "fit --config run.yaml --data.columns '{txt: text}'", "'txt'", "'text'"),
    _table("an empty text", REVIEWS + ",1\n", "line 10", "'text' is an empty text", "remove the row"),
    _table("a row without its label", REVIEWS + "nothing works,\n", "line 10", "the label in 'label' is empty"),
    _table("one label alone", _HEAD + "a film,1\n" * 5, "every row has the label 1"),
    _table("a label out of range", REVIEWS + "a film,7\n", "line 10", "0 to 1", options="--data.labels '[bad, good]'"),
    _table(
        "a label of one row",
        _HEAD + "a film,0\na river,1\n" * 30 + "patience,7\n",
        "line 62",
        "7, once in 61 rows",
        "labels: ['0', '1', '7']",
    ),
    _table("scores for labels", _HEAD + "a film,0.5\na river,4.22\n" * 9, "line 2", "0.5 (float)", "scores"),
    _table("several labels in a cell", _HEAD + 'a,x\nb,y\nc,"x,y"\n' * 5, "line 4", "'x,y'", "5 of 15 rows"),
    _table("dates for labels", _HEAD + "a film,2024-06-01\na river,2024-06-02\n" * 5, "line 2", "dates"),
    _table("two spellings of a label", _HEAD + "a,good\nb,bad\n" * 5 + "c,Good\n", "line 12", "'Good' (1)", "case"),
    _table(
        "columns of labels",
        "text,x,y\na film,0,1\na river,1,0\n" * 1 + "patience,1,1\n",
        "2 columns of 0 and 1",
        "columns: {text: text, label: x}",
    ),
    row(
        "a row longer than the model reads",
        f"{_FIT} bad.csv --data.max_length 600",
        "bad.csv, line 10",
        "512 positions",
        "--data.max_length",
        files={"bad.csv": REVIEWS + "see " * 700 + ",1\n"},
    ),
    _lines("half of a character", r'{"instruction": "\ud83d", "output": "a"}', "line 2", "'\\ud83d'", "UTF-8"),
    row(
        "a separator of a file that has none",
        f"{_WRITE} tasks.jsonl --data.delimiter ';'",
        "tasks.jsonl",
        ".csv, .tsv",
        "Leave them out",
    ),
    _table("labels with a gap", REVIEWS + "a film,7\n", "0, 1, 7", "labels: ['0', '1', '7']"),
    _table(
        "a misspelt label",
        _HEAD + "a film,good\na river,bad\n" * 4 + "patience,goood\n",
        "line 10",
        "'goood'",
        "'good'",
        options="--data.labels '[bad, good]'",
    ),
    row(
        "fewer rows than are set aside",
        f"{_FIT} bad.csv",
        "validation_size=2",
        "there are 2",
        files={"bad.csv": _HEAD + "a film,1\na river,0\n"},
    ),
    _lines("a text that is null", {**_GOOD, "instruction": None}, "line 2", "'instruction' is null"),
    _lines("a text that is a number", {**_GOOD, "instruction": 3}, "line 2", "3 (int)", "a text"),
    _json("a text that is not a number", '[{"instruction": NaN, "output": "again"}]', "row 1", "nan", "a text"),
    _json(
        "rows without an answer", '[{"instruction": "a", "output": ""}]', "nothing to learn from", "row 1", "answers"
    ),
    row(
        "rows that are all too long",
        "fit --config write.yaml --data.max_length 8",
        "tasks.jsonl",
        "max_length=8",
        "101",
    ),
    row("a length without room", "fit --config run.yaml --data.max_length 0", "--data.max_length", "at least 2"),
    row(
        "a template without its place",
        "fit --config write.yaml --data.template 'Write {task}'",
        "--data.template",
        "{instruction}",
        "{input}",
    ),
    row("no such padding token", "fit --config write.yaml --data.pad_token '<pda>'", "pad_token '<pda>'", "vocabulary"),
    row(
        "conversations with other keys",
        f"{_WRITE} talks.jsonl --data Messages",
        "no column 'messages'",
        "'conversations' holds from, value",
        "expected role and content",
        files={"talks.jsonl": '{"conversations": [{"from": "human", "value": "write"}]}\n'},
    ),
    _talk("a message without a role", [{"content": "write"}], "talks.jsonl, line 2", "message 1", "role"),
    _talk("a message that is a text", ["write"], "talks.jsonl, line 2", "message 1", "'write'", '"role"'),
    _talk("a conversation without a turn", [], "talks.jsonl, line 2", "[]", '"role"'),
    _talk("no template for conversations", _TALK["messages"], "no chat template", "--data.tokenizer NAME"),
    row("no such rows to predict", "predict trained review.csv", "no file review.csv", "'reviews.csv'"),
    row(
        "rows to predict without their text",
        "predict trained bad.csv",
        "bad.csv",
        "no column 'text'",
        "columns: {text: review}",
        files={"bad.csv": "review\na film\n"},
    ),
    row(
        "rows of other classes",
        "evaluate trained --source bad.csv",
        "bad.csv, line 2",
        "'one'",
        "0, 1",
        files={"bad.csv": "text,label\na,one\nb,two\nc,three\n"},
    ),
]

IMAGES = [
    row("folders without an image", _SEE, "photos/cat holds no image", make=_without_photos),
    row("an image that is cut off", _SEE, "1 of 4 images", "photos/cat/0.png", make=_cut_photo),
    row("an image that is none", _SEE, "1 of 5 images", "photos/cat/9.png", files={"photos/cat/9.png": b"no image"}),
    row(
        "another file among images", _SEE, "notes.txt is no image", "move it", files={"photos/cat/notes.txt": b"notes"}
    ),
    row("an image beside its classes", _SEE, "9.png lies beside", "cat, dog", files={"photos/9.png": b""}),
    row("one class of images", _SEE, "every row has the label 'cat'", make=lambda: shutil.rmtree("photos/dog")),
    row(
        "a list of images that are not there",
        f"{_SEE} --data.source list.csv",
        "list.csv, line 2",
        "photos/cat/77.png",
        files={"list.csv": "image,label\nphotos/cat/77.png,cat\nphotos/dog/1.png,dog\n"},
    ),
]
ROWS = [*FILES, *ROWS_OF_TEXT, *IMAGES]
