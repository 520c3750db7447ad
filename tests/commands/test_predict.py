"""`peftlight predict ADAPTER FILE`: what Lightning's predict writes, for any file, whatever the batch."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from commands.trained import COMMAND_LINE, fitted, gpt2_in, lightning
from peftlight.cli import main

pytestmark = COMMAND_LINE

TEXTS = ["a film", "nothing here works at all and it is a slow river", "see it again", "w", "patience " * 30]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]):
    """Runs the command, and gives the records that it prints; it prints nothing else."""

    def run(*arguments: object) -> list[dict]:
        capsys.readouterr()
        assert main(["predict", *map(str, arguments), "--traceback"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return fitted(root, encoder, "ia3", data__source="sample:sentiment")


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in TEXTS))
    return tmp_path / "mine.jsonl"


ROWS = {
    "SequenceClassification": ("encoder", "lora", "data/sst2", "sentiment", {"sentence": "a film"}),
    "TokenClassification": ("encoder", "prompt", "data/entities", "entities", {"tokens": ["Ada", "is", "here"]}),
    "CausalLM": ("decoder", "lora", "data/alpaca", "instructions", {"instruction": "write a list"}),
    "Seq2Seq": ("encoder_decoder", "ia3", "data/dialogsum", "dialogues", {"dialogue": "A: see it again"}),
}
"""For each task a base, a strategy, the data with the sample that stands in for it, and a row to predict."""


@pytest.mark.parametrize("task", ROWS)
def test_the_records_are_those_of_lightnings_predict(task: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base, strategy, overlay, sample, row = ROWS[task]
    short = {"model__max_new_tokens": 5} if task in ("CausalLM", "Seq2Seq") else {}
    run = fitted(tmp_path / "runs", request.getfixturevalue(base), strategy, overlay, data__source=f"sample:{sample}",
                 data__batch_size=2, **short)  # fmt: skip
    file = tmp_path / "mine.jsonl"
    key, value = next(iter(row.items()))
    longer = value * 3 if isinstance(value, list) else f"{value} and again a slow river"
    file.write_text("".join(json.dumps({key: each}) + "\n" for each in (value, longer, value)))
    theirs = lightning("predict", run, tmp_path / "predicted", f"--data.predict_source={file}")
    assert main(["predict", str(run), str(file), "--out", str(tmp_path / "ours.jsonl"), "--traceback"]) == 0
    ours = (tmp_path / "ours.jsonl").read_text()
    assert ours == (theirs / "predictions.jsonl").read_text()
    assert [json.loads(line)["id"] for line in ours.splitlines()] == [0, 1, 2]


def test_images_of_a_folder_are_named(tmp_path: Path, vision: Path, printed) -> None:
    from PIL import Image

    run = fitted(tmp_path / "runs", vision, "lora", "data/images", data__source="sample:shapes")
    (tmp_path / "mine").mkdir()
    for number in range(3):
        Image.new("RGB", (20, 30), (80 * number, 10, 200)).save(tmp_path / "mine" / f"{number}.png")
    theirs = lightning("predict", run, tmp_path / "predicted", f"--data.predict_source={tmp_path / 'mine'}")
    found = printed(run, tmp_path / "mine", "--batch_size", 3)
    expected = [json.loads(line) for line in (theirs / "predictions.jsonl").read_text().splitlines()]
    assert [record["file"] for record in found] == [record["file"] for record in expected]
    assert [record["probability"] for record in found] == pytest.approx([each["probability"] for each in expected])


@pytest.mark.parametrize(
    ("base", "strategy"), [("encoder", "lora"), ("encoder", "prompt"), ("decoder", "lora"), ("decoder", "prefix")]
)
def test_rows_in_a_padded_batch_are_classified_as_each_alone(
    base: str, strategy: str, tmp_path: Path, sentences: Path, printed, request: pytest.FixtureRequest
) -> None:
    run = fitted(tmp_path / "runs", request.getfixturevalue(base), strategy, data__source="sample:sentiment")
    together, alone = (printed(run, sentences, "--batch_size", size) for size in (8, 1))
    assert len(together) == len(TEXTS)
    for one, other in zip(together, alone, strict=True):
        assert one["id"] == other["id"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert len({record["probability"] for record in together}) == len(TEXTS)


@pytest.mark.parametrize("base", ["gpt2", "llama"])
@pytest.mark.parametrize("strategy", ["lora", "prefix", "prompt"])
def test_prompts_in_a_padded_batch_are_continued_as_each_alone(
    base: str, strategy: str, tmp_path: Path, printed, request: pytest.FixtureRequest
) -> None:
    folder = gpt2_in(tmp_path / "gpt2") if base == "gpt2" else request.getfixturevalue("decoder")
    run = fitted(tmp_path / "runs", folder, strategy, "data/english_quotes", data__source="sample:quotes",
                 model__max_new_tokens=12, trainer__limit_train_batches=2)  # fmt: skip
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps({"quote": text}) + "\n" for text in TEXTS))
    together, alone = (printed(run, file, "--batch_size", size) for size in (8, 1))
    assert together == alone
    assert len({record["completion"] for record in together}) > 1


def test_the_rows_of_the_training_are_not_needed(tmp_path: Path, encoder: Path, sentences: Path, printed) -> None:
    source = tmp_path / "gone.tsv"
    names = ("dull", "fine", "great") * 10
    source.write_text("text\tlabel\n" + "".join(f"row {n} of it\t{name}\n" for n, name in enumerate(names)))
    data = tmp_path / "data.yaml"
    data.write_text(f"data:\n  class_path: TextClassification\n  init_args: {{source: {source}}}\n")
    (tmp_path / "runs").mkdir()
    lora = str(Path(__file__).parents[2] / "configs" / "lora.yaml")
    flags = [f"--model.base_model={encoder}", f"--trainer.default_root_dir={tmp_path / 'runs'}",
             "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]  # fmt: skip
    assert main(["fit", "--config", lora, "--config", str(data), *flags, "--traceback"]) == 0
    source.unlink()
    (run,) = (tmp_path / "runs").iterdir()
    (tmp_path / "some.csv").write_text("text\nhello there\ngood bye\n")
    found = printed(run / "adapter", tmp_path / "some.csv")
    assert [list(record["probabilities"]) for record in found] == [["dull", "fine", "great"]] * 2


def test_a_folder_of_hf_peft_predicts_with_numbers_for_classes(tmp_path: Path, encoder: Path, printed) -> None:
    import peft

    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    base.save_pretrained(tmp_path / "base")
    words = AutoTokenizer.from_pretrained(encoder)
    words.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "some.csv").write_text("text\n" + "\n".join(TEXTS) + "\n")
    found = printed(tmp_path / "theirs", tmp_path / "some.csv", "--base", tmp_path / "base")
    for text, record in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            expected = theirs(**words(text, return_tensors="pt")).logits[0].softmax(-1)
        assert list(record["probabilities"]) == ["0", "1", "2"]
        assert list(record["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_tokenizer_without_a_padding_token_will_do(tmp_path: Path, printed) -> None:
    import peft
    from transformers import GPT2LMHeadModel

    folder = gpt2_in(tmp_path / "gpt2")
    special = json.loads((folder / "tokenizer_config.json").read_text())
    del special["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    assert AutoTokenizer.from_pretrained(folder).pad_token is None
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=["c_attn"], fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(folder), config)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "some.csv").write_text("text\n" + "\n".join(TEXTS[:3]) + "\n")
    together, alone = (printed(tmp_path / "theirs", tmp_path / "some.csv", "--batch_size", size) for size in (3, 1))
    assert together == alone
    assert all(record["completion"] for record in together)


def test_what_was_written_before_stays_whole_when_something_fails(
    run: Path, tmp_path: Path, sentences: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "made" / "out.jsonl"
    assert main(["predict", str(run), str(sentences), "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{len(TEXTS)} predictions: {out}" in captured.err
    before = out.read_text()
    assert len(before.splitlines()) == len(TEXTS)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert main(["predict", str(run), str(sentences), "--out", str(out)]) == 2
    assert "No room left to write" in capsys.readouterr().err
    assert out.read_text() == before
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_rows_that_leave_no_positions_to_write_in_are_refused_with_the_numbers_that_fit(
    tmp_path: Path, printed, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fitted(tmp_path / "runs", gpt2_in(tmp_path / "gpt2"), "prompt", "data/english_quotes",
                 data__source="sample:quotes", model__max_new_tokens=20)  # fmt: skip
    (tmp_path / "long.csv").write_text("quote\n" + "a " * 250 + "\nshort\n")
    long = AutoTokenizer.from_pretrained(tmp_path / "gpt2")("a " * 250)["input_ids"]
    config = (run / "config.yaml").read_text()
    assert "max_length: 128" in config
    (run / "config.yaml").write_text(config.replace("max_length: 128", "max_length: 1000"))
    assert main(["predict", str(run), str(tmp_path / "long.csv")]) == 2
    said = capsys.readouterr().err
    assert f"The longest row, of {len(long)} tokens, and max_new_tokens=20 need {len(long) + 20} positions" in said
    assert "long.csv, line 2" in said
    room = int(re.search(r"data\.max_length to (\d+)", said)[1])  # type: ignore[index]
    for length, code in ((room, 0), (room + 1, 2)):
        (run / "config.yaml").write_text(config.replace("max_length: 128", f"max_length: {length}"))
        assert main(["predict", str(run), str(tmp_path / "long.csv")]) == code


@pytest.mark.slow
def test_a_reader_that_has_had_enough_is_no_error(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "many.csv"
    file.write_text("sentence\n" + "a film to see again\n" * 2000)  # more than a pipe holds
    predict = f"{sys.executable} -W ignore -m peftlight predict {run} {file} --batch_size 500"
    command = f"{predict} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300, env=os.environ)
    first, code = done.stdout.splitlines()
    assert json.loads(first)["id"] == 0
    assert code == "0", done.stderr
    assert "Broken" not in done.stderr


def test_what_is_missing_or_wrong_is_said(
    run: Path, tmp_path: Path, sentences: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.csv").write_text("review\nfine\n")
    (tmp_path / "moved").mkdir()
    shutil.copytree(run / "adapter", tmp_path / "moved" / "it")
    for arguments, expected in (
        ([run, tmp_path / "mine.json"], "There is no file"),
        ([run, tmp_path / "other.csv"], "has no column 'sentence'"),
        ([tmp_path / "moved" / "it", sentences], "has no column 'text'"),
        ([tmp_path / "moved" / "it", sentences, "--data", "Instructions"], "makes the rows of CausalLM"),
        ([run, sentences, "--batch_size", 0], "batch_size must be at least 1; it is 0"),
        ([run], "FILE"),
    ):
        assert main(["predict", *map(str, arguments)]) == 2
        assert expected in capsys.readouterr().err


def test_a_folder_away_from_its_run_predicts_by_its_record(run: Path, tmp_path: Path, sentences: Path, printed) -> None:
    shutil.copytree(run / "adapter", tmp_path / "moved")
    (tmp_path / "some.csv").write_text("text\n" + "\n".join(TEXTS) + "\n")
    assert printed(tmp_path / "moved", tmp_path / "some.csv") == printed(run, sentences)


def test_without_a_word_that_stands_alone_it_is_lightnings(encoder: Path, tmp_path: Path) -> None:
    flags = [f"--model.base_model={encoder}", "--data.source=sample:sentiment", "--trainer.accelerator=cpu"]
    lora = str(Path(__file__).parents[2] / "configs" / "lora.yaml")
    root = f"--trainer.default_root_dir={tmp_path / 'runs'}"
    assert main(["predict", "--config", lora, *flags, root, "--trainer.limit_predict_batches=1"]) == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "predictions.jsonl").exists()
