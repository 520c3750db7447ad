"""Text that UTF-8 cannot hold: the row, the line of the configuration, or the argument is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peftlight.cli import main
from peftlight.data import Instructions, Messages, TextClassification
from peftlight.errors import UserError

EMOJI = r'"\ud83d\ude00"'
TALK = '{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": "b"}]}\n'
PLAIN = '{"instruction": %s, "output": "b", "note": "\\ud800"}\n'
LABELLED = '{"text": "a", "label": %s}\n{"text": "b", "label": "z"}\n'


@pytest.mark.parametrize(
    ("kind", "line"),
    [(TextClassification, LABELLED), (Instructions, PLAIN), (Messages, TALK)],
    ids=["label", "text", "message"],
)
@pytest.mark.parametrize("text", [r'"a \ud800 b"', r'"\udc00"', r'"\ude00\ud83d"'])
def test_half_of_a_character_names_its_row_and_a_whole_one_is_read(
    kind: type[Any], line: str, text: str, bpe: Callable[..., Any], write: Callable[..., str]
) -> None:
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    fields: dict[str, Any] = {"tokenizer": bpe(template=template), "validation_size": 1}
    good = line % EMOJI
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: .* holds '\\ud.*UTF-8"):
        kind(source=write("a.jsonl", good * 2 + line % text if kind is not TextClassification else good + line % text),
             **fields).setup("fit")  # fmt: skip
    kind(source=write("b.jsonl", good * 2), **fields).setup("fit")


def test_the_name_of_a_column_is_text_too(write: Callable[..., str], bpe: Callable[..., Any]) -> None:
    source = write("a.jsonl", '{"text": "a", "label": 0}\n{"te\\ud800": "a", "label": 1}\n')
    with pytest.raises(UserError, match=r"line 2: the name of a column .*te\\ud800"):
        TextClassification(source=source, tokenizer=bpe()).setup("fit")


def test_a_cell_of_parquet_that_is_not_utf_8_names_its_row(tmp_path: Path, bpe: Callable[..., Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"ba\xffd"], pa.binary()).buffers())
    pq.write_table(pa.table({"text": texts, "label": ["x", "y"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: 'text' is not UTF-8 \(byte 0xff\)"):
        TextClassification(source=str(tmp_path / "a.parquet"), tokenizer=bpe()).setup("fit")


def test_arguments_and_configurations_are_text_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "run", "--prompt", "caf\udce9"]) == 2
    assert r"'caf\udce9' on the command line holds bytes that are not UTF-8" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text('data:\n  template: "{instruction} \\ud800"\n')
    assert main(["fit", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml:2: this line is not YAML" in capsys.readouterr().err
