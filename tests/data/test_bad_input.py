"""Whatever is wrong with the input, the message names the file, the row and what would put it right."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from peftlight.data import SST2, EnglishQuotes, Instructions, Messages, PlainText, TextClassification, TextData
from peftlight.errors import UserError

GOOD = "text,label\ngood,1\nbad,0\nfine,1\npoor,0\n"


@dataclass
class Case:
    """One bad input."""

    name: str
    files: dict[str, Any]
    kind: type[TextData]
    parts: list[str]
    source: str = ""
    fields: dict[str, Any] = field(default_factory=dict)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    stage: str = "fit"


def _messages(cell: Any) -> dict[str, Any]:
    return {"m.jsonl": [{"messages": [{"role": "user", "content": "a"}]}, {"messages": cell}]}


READING = [
    Case("missing file", {"reviews.csv": GOOD}, TextClassification, ["revews.csv", "'reviews.csv'"], "revews.csv"),
    Case("missing folder", {}, TextClassification, ["no file", "nowhere", "does not exist"], "nowhere/a.csv"),
    Case("empty file", {"a.csv": ""}, TextClassification, ["a.csv is empty"]),
    Case("header alone", {"a.csv": "text,label\n"}, TextClassification, ["a.csv has no rows"]),
    Case("empty list", {"a.json": "[]"}, TextClassification, ["a.json has no rows"]),
    Case("cut off", {"a.json": '[{"text": "a"}, {"tex'}, PlainText, ["a.json, line 1", "cut off"]),
    Case("bad JSON", {"a.json": '[{"text": "a"},\n {"text": }]'}, PlainText, ["a.json, line 2", "column 11"]),
    Case("lines as JSON", {"a.json": '{"text": "a"}\n{"text": "b"}'}, PlainText, ["a.json, line 2", ".jsonl"]),
    Case("other JSON", {"a.json": '{"rows": []}'}, PlainText, ["a.json", "rows", '{"data": [...]}']),
    Case("number as JSON", {"a.json": "3"}, PlainText, ["a.json", "a number", "list of objects"]),
    Case("bad line", {"a.jsonl": '{"text": "a"}\n\n{"text": "b"\n'}, PlainText, ["a.jsonl, line 3", "JSON"]),
    Case("line not an object", {"a.jsonl": '{"text": "a"}\n["b"]\n'}, PlainText, ["a.jsonl, line 2", "a list"]),
    Case("not UTF-8", {"a.csv": b"text,label\ngood,1\nm\xe9chant,0\n"}, TextClassification, ["a.csv, line 3", "0xe9"]),
    Case("extension", {"a.xml": "<a/>"}, PlainText, ["a.xml", "'.xml'", ".jsonl"]),
    Case("CSV cells", {"a.csv": GOOD + "a,b,1\n"}, TextClassification, ["a.csv, line 6", "3 cells", "2 (text, label)"]),
    Case("TSV cells", {"a.tsv": "text\tlabel\na\t1\nb\n"}, TextClassification, ["a.tsv, line 3", "1 cells", "tab"]),
    Case("CSV quotes", {"a.csv": 'text,label\na,1\n"b,0\nc,0\n'}, TextClassification, ["a.csv, line 3", "CSV"]),
    Case("CSV header", {"a.csv": "text,text\na,1\n"}, TextClassification, ["a.csv, line 1", "header"]),
    Case("broken parquet", {"a.parquet": b"PAR1 no"}, PlainText, ["a.parquet", "not a whole parquet file"]),
    Case("unclear folder", {"d/train.csv": GOOD, "d/more.csv": GOOD}, PlainText, ["more.csv", "glob"], "d"),
    Case("folder without data", {"d/a.txt": "a"}, PlainText, ["holds no data file", ".jsonl"], "d"),
    Case("unknown sample", {}, PlainText, ["'quote'", "'quotes'"], "sample:quote"),
    Case("subset of a file", {"a.csv": GOOD}, TextClassification, ["subset 'x'", "local"], fields={"subset": "x"}),
]

CELLS = [
    Case(
        "missing column",
        {"a.csv": "review,stars\ngood,1\n"},
        TextClassification,
        [
            "a.csv has no column 'text' and no column 'label'",
            "review, stars",
            "text, label",
            "columns: {text: review, label: stars}",
        ],
    ),
    Case(
        "near column",
        {"a.csv": "id,Text,labels\n1,good,1\n"},
        TextClassification,
        ["columns: {text: Text, label: labels}"],
    ),
    Case(
        "mapped column",
        {"a.csv": GOOD},
        TextClassification,
        ["'review' (columns maps text to it)", "columns: {text: text, label: label}"],
        fields={"columns": {"text": "review"}},
    ),
    Case("unknown name", {"a.csv": GOOD}, TextClassification, ["'txt'", "'text'"], fields={"columns": {"txt": "a"}}),
    Case("quotes", {"a.jsonl": [{"text": "a"}]}, EnglishQuotes, ["'quote'", "columns: {text: text}"]),
    Case("missing key", {"a.jsonl": [{"text": "a"}, {"txt": "b"}]}, PlainText, ["a.jsonl, line 2", "no 'text'"]),
    Case("null", {"a.json": [{"text": "a"}, {"text": None}]}, PlainText, ["a.json, row 2", "'text' is null"]),
    Case("null in parquet", {"a.parquet": [{"text": "a"}, {"text": None}]}, PlainText, ["a.parquet, row 2", "null"]),
    Case("empty text", {"a.csv": GOOD + " ,1\n"}, TextClassification, ["a.csv, line 6", "'text' is an empty text"]),
    Case("empty label", {"a.csv": GOOD + "a,\n"}, TextClassification, ["a.csv, line 6", "'label' is empty"]),
    Case("not a text", {"a.json": [{"text": 3}]}, PlainText, ["a.json, row 1", "3 (int)"]),
    Case(
        "label type",
        {"a.json": [{"text": "a", "label": 0}, {"text": "a", "label": 1.5}]},
        TextClassification,
        ["a.json, row 2", "1.5 (float)", "integer"],
    ),
    Case(
        "label range",
        {"a.csv": GOOD + "a,2\n"},
        TextClassification,
        ["a.csv, line 6", "label 2 is outside the range 0 to 1", "negative, positive"],
        fields={"labels": ["negative", "positive"]},
    ),
    Case(
        "label of validation",
        {"train.csv": GOOD, "dev.csv": GOOD + "a,5\n"},
        TextClassification,
        ["dev.csv, line 6", "label 5 is outside the range 0 to 1"],
        "*.csv",
    ),
    Case("label gap", {"a.csv": GOOD + "a,3\n"}, TextClassification, ["0, 1, 3", "labels: ['0', '1', '3']"]),
    Case("one label", {"a.csv": "text,label\na,1\nb,1\n"}, TextClassification, ["a.csv", "every row has the label 1"]),
    Case("mixed -1", {"a.csv": GOOD + "a,-1\n"}, TextClassification, ["a.csv, line 6", "label -1 is outside"]),
    Case(
        "mixed -1 in the test split",
        {"train.csv": GOOD.replace("text", "sentence"), "test.csv": "sentence,label\na,1\nb,-1\n"},
        SST2,
        ["test.csv, line 3", "label -1 is outside the range 0 to 1"],
        "*.csv",
        stage="test",
    ),
    Case(
        "label name",
        {"a.csv": GOOD.replace(",1", ",positive").replace(",0", ",negative") + "a,postive\n"},
        TextClassification,
        ["a.csv, line 6", "'postive'", "Did you mean 'positive'", "negative, positive"],
        fields={"labels": ["negative", "positive"]},
    ),
    Case(
        "pair in one file",
        {"1.json": [{"text": "a", "text_pair": "b", "label": 0}], "2.json": [{"text": "a", "label": 1}]},
        TextClassification,
        ["2.json", "'text_pair'"],
        "*.json",
    ),
    Case("not a conversation", _messages("hello"), Messages, ["m.jsonl, line 2", "'hello' (str)", '"role"']),
    Case("not a message", _messages(["hello"]), Messages, ["m.jsonl, line 2", "message 1", "'hello' (str)"]),
    Case("no role", _messages([{"content": "a"}]), Messages, ["m.jsonl, line 2", "message 1", "role None"]),
    Case("no turns", _messages([]), Messages, ["m.jsonl, line 2", "[] (list)"]),
    Case(
        "no output",
        {"a.json": [{"instruction": "a", "answer": "b"}]},
        Instructions,
        ["a.json", "'output'", "columns: {instruction: instruction, output: answer}"],
    ),
]

ROWS = [{"instruction": "a long question " * 9, "output": "b"}] * 8
SHORT = [{"instruction": "a", "output": "b"}] * 8

LIMITS = [
    Case("all cut", {"a.json": ROWS}, Instructions, ["a.json", "max_length=20", "longest"], fields={"max_length": 20}),
    Case(
        "many empty",
        {"a.json": [*SHORT, {"instruction": "a", "output": ""}]},
        Instructions,
        ["a.json", "1 of 9 rows", "row 9", "max_empty=0.05"],
    ),
    Case("validation size", {"a.json": SHORT}, Instructions, ["=8", "there are 8"], fields={"validation_size": 8}),
    Case("share", {"a.json": SHORT}, Instructions, ["validation_size", "1.5"], fields={"validation_size": 1.5}),
    Case("batch size", {"a.json": SHORT}, Instructions, ["batch_size must be at least 1"], fields={"batch_size": 0}),
    Case(
        "no room",
        {"a.csv": GOOD},
        TextClassification,
        ["max_length=2", "special tokens"],
        fields={"max_length": 2, "tokenizer": "minilm"},
    ),
    Case("one label name", {"a.csv": GOOD}, TextClassification, ["labels", "two"], fields={"labels": ["a"]}),
    Case("template", {"a.json": SHORT}, Instructions, ["template", "{input}"], fields={"template": "{instruction}"}),
    Case(
        "answer in the template",
        {"a.json": SHORT},
        Instructions,
        ["template_without_input", "{output}"],
        fields={"template_without_input": "{instruction} {output}"},
    ),
    Case(
        "no padding token",
        {"a.json": SHORT},
        Instructions,
        ["no padding token", "--data.pad_token '</s>'"],
        tokenizer={"pad": False},
    ),
    Case(
        "unknown padding token",
        {"a.json": SHORT},
        Instructions,
        ["'<pda>'", "'<pad>'"],
        fields={"pad_token": "<pda>"},
    ),
    Case("no end token", {"a.json": SHORT}, Instructions, ["no end-of-text token"], tokenizer={"eos": False}),
    Case("no tokenizer", {"a.json": SHORT}, Instructions, ["--data.tokenizer"], fields={"tokenizer": None}),
    Case("bad tokenizer", {"a.json": SHORT}, Instructions, ["'./nowhere'"], fields={"tokenizer": "./nowhere"}),
    Case("slow tokenizer", {"a.json": SHORT}, Instructions, ["slow", "tokenizer.json"], fields={"tokenizer": object()}),
    Case("no labels", {"dev.csv": GOOD}, TextClassification, ["labels: ["], "*.csv", stage="validate"),
]


@pytest.mark.parametrize("case", READING + CELLS + LIMITS, ids=lambda case: case.name)
def test_bad_input(
    case: Case,
    bpe: Callable[..., Any],
    write: Callable[..., str],
    tmp_path: Any,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, content in case.files.items():
        write(name, content)
    monkeypatch.chdir(tmp_path)
    source = case.source or next(iter(case.files))
    fields = {"tokenizer": bpe(template="{{ messages }}", **case.tokenizer)} | case.fields
    if fields["tokenizer"] == "minilm":
        fields["tokenizer"] = request.getfixturevalue("minilm")
    with pytest.raises(UserError) as error:
        case.kind(source=source, **fields).setup(case.stage)
    message = str(error.value)
    for part in case.parts:
        assert part in message


def test_a_split_that_is_not_there_names_the_option(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    data = TextClassification(source=write("a.csv", GOOD), tokenizer=bpe(), validation_size=1)
    with pytest.raises(UserError, match="setup"):
        data.train_dataloader()
    data.setup()
    with pytest.raises(UserError, match=r"no test split.*--data\.test_source"):
        data.test_dataloader()


def test_a_hub_data_set_out_of_reach_points_to_local_files(
    bpe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def unreachable(*names: Any) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError) as error:
        SST2(tokenizer=bpe()).setup("fit")
    for part in ("'stanfordnlp/sst2'", "Couldn't reach the hub", "--data.source path/to/train.jsonl"):
        assert part in str(error.value)
    assert "long story" not in str(error.value)


def test_without_the_package_datasets_the_hub_names_it(
    bpe: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        SST2(tokenizer=bpe()).setup("fit")
