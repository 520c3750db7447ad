"""Which labels are classes by themselves, and which are scores, ids, lists or mistakes; the option then works."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import yaml

from peftlight.data import TextClassification
from peftlight.data.labels import labels_of
from peftlight.data.table import Table
from peftlight.errors import UserError

EXPECTED = ("text", "label")


def _table(labels: Sequence[Any], **columns: Sequence[Any]) -> Table:
    cells: dict[str, Sequence[Any]] = {"text": ["a"] * len(labels), "label": labels, **columns}
    return Table("a.csv", "line", list(cells), range(2, 2 + len(labels)), cells.__getitem__)


def _times(**counts: int) -> list[str]:
    return [name for name, count in counts.items() for _ in range(count)]


CLASSES: dict[str, tuple[Sequence[Any], list[str], list[str]]] = {
    "two": (["0", "1"] * 30, ["0", "1"], []),
    "two of very different sizes": (["0"] * 999 + ["1"], ["0", "1"], ["come once"]),
    "names": (["good", "bad"] * 5, ["bad", "good"], []),
    "truth values": ([True, False] * 5, ["0", "1"], []),
    "True as text": (["True", "False"] * 5, ["False", "True"], []),
    "whole floats, as pandas writes numbers beside gaps": (["1.0", "0.0", 1.0], ["0", "1"], []),
    "77 intents with two rows each": ([str(at % 77) for at in range(154)], [str(at) for at in range(77)], []),
    "150 intents": ([f"intent_{at % 150}" for at in range(450)], sorted(f"intent_{at}" for at in range(150)), []),
    "stars": ([str(1 + at % 5) for at in range(120)], ["1", "2", "3", "4", "5"], ["1 to 5", "5 classes", "5 is 4"]),
    "stars of which one is rare": (
        [*("1", "2", "4", "5") * 30, "3"], ["1", "2", "3", "4", "5"], ["3 is 2", "3 (a.csv, line 122)"]
    ),
    "coded 1 and 2": (["1", "2"] * 20, ["1", "2"], ["1 is 0, 2 is 1"]),
    "coded -1 and 1": (["-1", "1"] * 20, ["-1", "1"], ["-1 is 0, 1 is 1"]),
    "coded 0 and 4": ([0, 4] * 20, ["0", "4"], ["0 is 0, 4 is 1"]),
    "ten and more in the order of numbers": ([str(at % 12) for at in range(48)], [str(at) for at in range(12)], []),
    "codes that begin with zeros": (["007", "010"] * 5, ["007", "010"], []),
    "digits and letters": (["1", "a", "2", "b"] * 5, ["1", "2", "a", "b"], ["1 (5)", "a (5)"]),
    "names with commas": (["Books, Films", "Toys, Games"] * 9, ["Books, Films", "Toys, Games"], []),
    "names like others": (["entailment", "not_entailment"] * 20, ["entailment", "not_entailment"], []),
    "numbered names, one of them once": (
        [f"class_{at % 12}" for at in range(240)] + ["class_12"], sorted(f"class_{at}" for at in range(13)), ["once"]
    ),
    "the label None beside others": (["None", "favor", "against"] * 10, ["None", "against", "favor"], []),
    "a long tail": (_times(a=60, b=20, c=7, d=3, e=1, f=1), ["a", "b", "c", "d", "e", "f"], ["'e' (", "'f' ("]),
}  # fmt: skip

REFUSED: dict[str, tuple[Sequence[Any], list[str]]] = {
    "scores": ([f"{at / 7:.2f}" for at in range(59)] + ["0.14"], ["line 3", "0.14", "59 different", "60 of 60 rows"]),
    "scores as JSON numbers": ([0.5, 1.5] * 5, ["line 2", "0.5 (float)", "2 different numbers"]),
    "half stars": (["0.5", "1.0", "1.5"] * 20, ["line 2", "3 different numbers", "'0.5', '1', '1.5'"]),
    "scores with a comma": (["4,22", "3,1", "2,5"] * 3, ["line 2", "4.22"]),
    "a stray number": (["0", "1"] * 99 + ["0", "7"], ["line 201", "7, once in 200 rows", "probably a mistake", "'7'"]),
    "a few stray numbers": ([0, 1] * 2000 + [7, 7, 7], ["line 4002", "7, 3 times in 4,003 rows"]),
    "a stray name": (_times(yes=60, no=60, x=1), ["line 122", "'x', once in 121 rows"]),
    "a misspelt name": (_times(positive=20, negative=20, postive=1), ["line 42", "'postive', once", "'positive' (20"]),
    "two spellings": (_times(pos=8, Pos=2, neg=9), ["line 10", "'Pos' (2), 'pos' (8)", "case"]),
    "joined": ([*_times(toxic=20, threat=10), "toxic,threat"], ["line 32", "'toxic,threat'", "1 of 31 rows"]),
    "joined alone": (["a;b", "b;c", "a;c"] * 9, ["line 2", "'a;b'", "27 of 27 rows"]),
    "joined with bars": (["drama|war", "war", "drama"] * 9, ["line 2", "9 of 27 rows"]),
    "joined numbers": (["0", "1", "0,1"] * 9, ["line 4", "'0,1'", "9 of 27 rows"]),
    "lists as text": (["['toxic', 'threat']", "['toxic']"] * 9, ["line 2", "18 of 18 rows"]),
    "ids": ([1000 + 7 * at for at in range(60)], ["60 different values in 60 rows"]),
    "ids of several rows": ([1000 + 7 * (at % 30) for at in range(90)], ["30 different numbers that skip some"]),
    "counted rows": (list(range(40)), ["40 different values in 40 rows"]),
    "texts": ([f"a sentence of its own, number {at}" for at in range(30)], ["30 different values in 30 rows"]),
    "dates": ([f"2024-06-{1 + at % 9:02}" for at in range(90)], ["line 2", "dates", "9 different"]),
    "missing": (["good", "bad", "nan"] * 9, ["line 4", "'nan'", "missing", "9 of 27 rows"]),
    "-1 among others": ([-1, 0, 1] * 9, ["line 2", "label -1 is outside the range", "-1 (9), 0 (9), 1 (9)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_ordinary_labels_are_classes_without_an_option(name: str) -> None:
    labels, names, says = CLASSES[name]
    found = labels_of([_table(labels)], EXPECTED, {}, None)
    assert found.names == names
    assert Counter(found.indices.tolist()) == Counter(names.index(str(_plain(label))) for label in labels)
    assert all(part in " ".join(found.findings) for part in says), found.findings
    assert bool(says) == bool(found.findings)


def _plain(label: Any) -> Any:
    return int(float(label)) if isinstance(label, bool | float) or str(label).endswith(".0") else label


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_class_is_refused_with_row_and_counts_and_the_option_lets_it_through(name: str) -> None:
    labels, says = REFUSED[name]
    table = _table(labels)
    with pytest.raises(UserError) as error:
        labels_of([table], EXPECTED, {}, None)
    message = str(error.value)
    assert all(part in message for part in ["a.csv, line", *says]), message
    option = yaml.safe_load(message[message.index("labels: [") :])["labels"]
    if "more" not in str(option[-1]):
        assert set(labels_of([table], EXPECTED, {}, option).indices.tolist()) == set(range(len(option)))


def test_of_words_some_tags_are_rare_and_the_signs_of_a_text_are_tags_too() -> None:
    tags = ["O"] * 90 + ["B-PER", "I-PER"] * 9 + ["B-LOC", ",", ":", "``"]
    assert labels_of([_table(tags)], EXPECTED, {}, None, of_words=True).names == sorted(set(tags))
    for stray, like in (("B-PERSON", "B-PERSONS"), ("b-per", "B-PER")):
        with pytest.raises(UserError, match=r"line 1[0-9][0-9]: "):
            labels_of([_table([*tags, *[like] * 10, stray])], EXPECTED, {}, None, of_words=True)


@pytest.mark.parametrize("cell", [["toxic", "threat"], [0, 1, 1.0]])
def test_a_list_is_several_labels(cell: list[object]) -> None:
    with pytest.raises(UserError, match=r"line 2: .*3 of 4 rows hold several labels"):
        labels_of([_table([cell, cell[:1], cell, cell])], EXPECTED, {}, None)


def test_columns_of_marks_are_several_labels_and_the_advice_takes_one() -> None:
    marks = {"toxic": ["0", "1", "1"], "threat": ["1", "0", "1"]}
    table = _table(["x"] * 3, **marks)
    table.columns.remove("label")
    with pytest.raises(UserError) as error:
        labels_of([table], EXPECTED, {}, None)
    message = str(error.value)
    assert "2 columns of 0 and 1 (toxic, threat): several labels a row" in message
    columns = yaml.safe_load(message[message.index("columns: {") :])["columns"]
    assert labels_of([table], EXPECTED, columns, None).indices.tolist() == [0, 1, 1]


def test_what_was_found_is_said_again_from_the_cache(
    bpe: Callable[..., Any], write: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write("stars.csv", "text;label\n" + "".join(f"a film;{1 + at % 5}\n" for at in range(40)))
    for _ in range(2):
        caplog.clear()
        data = TextClassification(source=source, tokenizer=bpe())
        with caplog.at_level("INFO"):
            data.setup("fit")
        assert data.label_names == ["1", "2", "3", "4", "5"]
        for says in ("separated by semicolons", "the labels 1 to 5 are 5 classes", "3 is 2"):
            assert len([record for record in caplog.records if says in record.getMessage()]) == 1


def test_a_class_that_no_training_row_has_is_named(
    bpe: Callable[..., Any], write: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    source = write("a.csv", "text,label\n" + "a film,good\na film,bad\n" * 5)
    with caplog.at_level("INFO"):
        TextClassification(source=source, tokenizer=bpe(), labels=["bad", "good", "fair"]).setup("fit")
    assert "No training row is of the class fair" in caplog.text
