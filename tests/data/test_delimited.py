"""Separators and quotes are found in the whole file: what a csv writer wrote comes back, and text keeps its quotes."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from peftlight.data import TextClassification
from peftlight.data.layout import layout_of
from peftlight.data.reading import read_file
from peftlight.errors import UserError

ROWS = [
    ["text", "label"],
    ['he said "well"', "a"],
    ["one,\ttwo; three|four", "b"],
    ["a line\nand another\r\n", "a"],
    ["plain", "b"],
    ["it's, fine", "a"],
]


def _written(rows: Sequence[Sequence[str]], **how: Any) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **how).writerows(rows)
    return out.getvalue()


def _rows(path: str, **layout: Any) -> list[list[object]]:
    table = read_file(path, layout_of(layout.get("delimiter"), layout.get("quoting")))
    return [table.columns, *map(list, zip(*(table.cells(name) for name in table.columns), strict=True))]


WRITERS: dict[str, dict[str, Any]] = {
    "minimal": {},
    "all": {"quoting": csv.QUOTE_ALL},
    "lines of Unix": {"lineterminator": "\n"},
    "backslashes": {"doublequote": False, "escapechar": "\\"},
    "backslashes, all": {"doublequote": False, "escapechar": "\\", "quoting": csv.QUOTE_ALL},
}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", [".csv", ".tsv"])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_csv_writer_wrote_comes_back(
    writer: str, ending: str, delimiter: str, write: Callable[..., str]
) -> None:
    if writer.startswith("backslashes") and delimiter == "\t":
        pytest.skip("a backslash before a quote is text in a tab-separated file unless it is said")
    path = write(f"a{ending}", _written(ROWS, delimiter=delimiter, **WRITERS[writer]).encode())
    assert _rows(path) == ROWS
    notices = " ".join(read_file(path).notices)
    assert ("separated by" in notices) == (delimiter != {".csv": ",", ".tsv": "\t"}[ending])
    assert ("csv writer" in notices) == (delimiter == "\t")


QUOTES_OF_TEXT = {
    "in the middle": 'text\tlabel\n`` good " , he said\t1\na film\t0\n',
    "around a part": 'text\tlabel\n" extreme ops " exceeds expectations .\t1\na film\t0\n',
    "around some whole texts": 'text\tlabel\n"Not bad at all."\t1\na film, a river\t0\nfine\t1\n',
    "opened and never closed": 'text\tlabel\n"good\t1\nbad\t0\n',
}


@pytest.mark.parametrize("name", QUOTES_OF_TEXT)
def test_quotes_that_are_text_stay(name: str, write: Callable[..., str]) -> None:
    path = write("a.tsv", QUOTES_OF_TEXT[name])
    assert _rows(path) == [line.split("\t") for line in QUOTES_OF_TEXT[name].splitlines()]
    assert bool(read_file(path).notices) == ("whole" in name)


def test_every_line_of_a_real_file_with_quotes_in_its_text_stays_as_it_is(real_data: Path) -> None:
    table = read_file(real_data / "sst2_validation.tsv")
    lines = (real_data / "sst2_validation.tsv").read_text().split("\n")
    assert list(table.cells("sentence")) == [line.split("\t")[0] for line in lines[1:] if line]


def test_excels_tabs_with_each_comma_in_quotes(write: Callable[..., str]) -> None:
    path = write("a.tsv", 'text\tlabel\r\n"a film, a river"\t1\r\nfine\t0\r\n"well, well"\t1\r\n')
    assert [row[0] for row in _rows(path)] == ["text", "a film, a river", "fine", "well, well"]


@pytest.mark.parametrize(
    ("text", "rows", "says"),
    [
        ("sep=;\na;b\n1,5;x\n", [["a", "b"], ["1,5", "x"]], ""),
        ("\ufeffa;b\r\n1,5;x\r\n", [["a", "b"], ["1,5", "x"]], "semicolons"),
        (",a,b\n0,x,y\n1,z,w\n", [["a", "b"], ["x", "y"], ["z", "w"]], "first column has no name"),
        ("a,b,\nx,y,\nz,w,\n", [["a", "b"], ["x", "y"], ["z", "w"]], "without a name"),
        ("a,b\nx,y,\nz,w,\n", [["a", "b"], ["x", "y"], ["z", "w"]], "without a name"),
        ('"a" "b"\n'.replace(" ", ",") + "1,x,y\n2,z,w\n", [["a", "b"], ["x", "y"], ["z", "w"]], "no name"),
        ("a\nx, y\n", None, ""),
        ("text\nwithout a separator\n", [["text"], ["without a separator"]], ""),
    ],
)
def test_files_of_other_programs(text: str, rows: list[list[str]] | None, says: str, write: Callable[..., str]) -> None:
    path = write("a.csv", text)
    if rows is None:
        with pytest.raises(UserError, match=r"line 2: 2 cells where the header has 1"):
            read_file(path)
        return
    assert _rows(path) == rows
    assert says in " ".join(read_file(path).notices)
    assert bool(says) == bool(read_file(path).notices)


def test_the_line_of_a_mistake_is_right_after_cells_of_several_lines(write: Callable[..., str]) -> None:
    for start, line in (("", 5), ("sep=;\r\n", 6)):
        path = write("a.csv", f'{start}a;b\n"one\ntwo";x\n"y\nz"\n')
        with pytest.raises(UserError, match=rf"line {line - 1}: 1 cells where the header has 2 \(a, b\).*semicolon"):
            read_file(path)


def test_a_mistake_in_a_file_with_another_separator_is_told_of_that_separator(write: Callable[..., str]) -> None:
    path = write("a.csv", "a;b\n" + "x;y\n" * 9 + "x;y;z\n")
    with pytest.raises(UserError, match=r"line 11: 3 cells where the header has 2.*semicolon"):
        read_file(path)


ADVICE = {
    "quotes that are text": (
        "a.csv", 'a,b\n"x" y,0\nz,1\n', {"quoting": "none"}, [["a", "b"], ['"x" y', "0"], ["z", "1"]]
    ),
    "quotes around a tab, and one that is text": (
        "a.tsv", 'a\tb\n"x\ty"\t0\n5" z\t1\n', {"quoting": "minimal"}, [["a", "b"], ["x\ty", "0"], ['5" z', "1"]]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ADVICE)
def test_the_advice_on_quotes_works(name: str, write: Callable[..., str]) -> None:
    file, text, layout, rows = ADVICE[name]
    path = write(file, text)
    with pytest.raises(UserError, match=rf"line 2: .*--data\.quoting {layout['quoting']}"):
        read_file(path)
    assert _rows(path, **layout) == rows


def test_what_is_given_holds_and_is_not_the_cached_file_of_what_was_found(
    bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    source = write("a.tsv", 'text\tlabel\n"say ""fox"""\tb\n"a film"\ta\n' * 1 + '"a dog"\ta\n"a fox"\tb\n')

    def tokens(**layout: Any) -> int:
        data = TextClassification(source=source, tokenizer=bpe(), validation_size=1, **layout)
        data.setup("fit")
        return data.summaries["train"].tokens + data.summaries["validation"].tokens  # type: ignore[attr-defined]

    found = tokens()
    assert tokens(delimiter="tab", quoting="none") > found == tokens(quoting="minimal") == tokens()


def test_layouts_that_cannot_be(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match="one character, or the word tab; it is ';;'"):
        TextClassification(source="a.csv", delimiter=";;")
    source = write("a.json", [{"text": "a", "label": 0}])
    with pytest.raises(UserError, match=r"files that end in \.csv, \.tsv; the source is .*a\.json"):
        TextClassification(source=source, tokenizer=bpe(), delimiter=";").setup("fit")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-16-le"])
def test_utf_16_is_named(encoding: str, write: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"line 1: .*UTF-16.*Save the file as UTF-8"):
        read_file(write("a.csv", "text,label\na,1\n".encode(encoding)))
