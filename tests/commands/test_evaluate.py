"""`peftlight evaluate`: the figures of each run's own validation, side by side, and of the base as it comes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForCausalLM

from commands.trained import COMMAND_LINE, fitted, lightning, metrics_of
from peftlight import data
from peftlight.cli import main
from peftlight.errors import UserError
from peftlight.on_data.run_config import ROWS, config_of_run
from peftlight.tasks import SequenceClassification

pytestmark = COMMAND_LINE

TASKS = {
    "SequenceClassification": ("encoder", "bitfit", "data/sst2", "sentiment"),
    "TokenClassification": ("encoder", "ia3", "data/entities", "entities"),
    "CausalLM": ("decoder", "prefix", "data/alpaca", "instructions"),
    "Seq2Seq": ("encoder_decoder", "lora", "data/dialogsum", "dialogues"),
    "ImageClassification": ("vision", "pfeiffer", "data/images", "shapes"),
}
"""For each task a base, a strategy, the data and the sample that stands in for it."""


def figures(folder: Path, *arguments: object) -> dict:
    """What the command writes as JSON."""
    file = folder / "figures.json"
    assert main(["evaluate", "--traceback", *map(str, arguments), "--json", str(file)]) == 0
    found: dict = json.loads(file.read_text())
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, encoder: Path) -> dict[str, Path]:
    """Runs of several strategies on one base and one data set."""
    root = tmp_path_factory.mktemp("runs")
    return {name: fitted(root, encoder, name, data__source="sample:sentiment") for name in ("lora", "ia3", "prefix")}


@pytest.mark.parametrize("task", TASKS)
def test_the_figures_are_those_of_lightnings_validation(
    task: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base, strategy, overlay, sample = TASKS[task]
    short = {"model__max_new_tokens": 4} if task == "Seq2Seq" else {}
    run = fitted(tmp_path / "runs", request.getfixturevalue(base), strategy, overlay, data__source=f"sample:{sample}",
                 **short)  # fmt: skip
    expected = metrics_of(lightning("validate", run, tmp_path / "validated"))
    found = figures(tmp_path, run)
    assert found["rows"][1]["metrics"] == expected
    assert len(expected) > 1
    assert found["data"]["split"] == "validation"
    before = found["rows"][0]
    if task in ("CausalLM", "Seq2Seq"):
        assert before["metrics"].keys() == expected.keys()
        assert before["metrics"]["loss"] != expected["loss"]
    else:
        assert before["metrics"] is None


WEIGHTED = """
import torch
from peftlight.tasks import SequenceClassification


class Weighted(SequenceClassification):
    def loss(self, batch):
        weights, labels = torch.tensor([0.01, 3.0]), batch["labels"]
        scores = self.logits(batch)
        return torch.nn.functional.cross_entropy(scores, labels, weights, reduction="sum"), weights[labels].sum()
"""


def test_the_loss_of_a_users_task_is_the_one_that_it_trained_by(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weighted_task.py").write_text(WEIGHTED)
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"data__source": "sample:sentiment", "model": "weighted_task.Weighted"}
    run = fitted(tmp_path / "runs", encoder, "lora", **options)
    trusted = ("--config", run / "config.yaml")
    found = figures(tmp_path, run, *trusted)["rows"][1]["metrics"]
    assert found == pytest.approx(metrics_of(run))
    monkeypatch.setattr(sys.modules["weighted_task"].Weighted, "loss", SequenceClassification.loss)
    assert figures(tmp_path, run, *trusted)["rows"][1]["metrics"]["loss"] != pytest.approx(found["loss"], rel=1e-3)


def test_a_base_in_half_precision_is_measured_as_it_was_trained_or_in_another(tmp_path: Path, decoder: Path) -> None:
    run = fitted(tmp_path / "runs", decoder, "lora", "data/english_quotes", data__source="sample:quotes",
                 model__dtype="bfloat16")  # fmt: skip
    expected = metrics_of(lightning("validate", run, tmp_path / "validated"))
    assert figures(tmp_path, run)["rows"][1]["metrics"] == expected
    assert figures(tmp_path, run, "--dtype", "auto")["rows"][1]["metrics"].keys() == expected.keys()
    exact = figures(tmp_path, run, "--dtype", "float32")["rows"][1]["metrics"]
    assert exact != expected
    assert exact["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_several_strategies_on_one_base_each_as_in_its_own_run(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"{name}={run}" for name, run in runs.items()]
    found = figures(tmp_path, given[0], f"ia3={runs['ia3'] / 'adapter'}", given[2])
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["base", *runs]
    for name, run in runs.items():
        assert rows[name]["metrics"] == metrics_of(run)
        trained = sum(row["parameters"] for row in json.loads((run / "run.json").read_text())["trained"])
        assert rows[name]["parameters"] == trained
    share = rows["lora"]["metrics"]["accuracy"]
    assert rows["lora"]["answers"] == 48
    assert rows["lora"]["accuracy_error"] == pytest.approx((share * (1 - share) / 48) ** 0.5)
    shown = capsys.readouterr().out
    expected = ("LoRA", "PrefixTuning", "accuracy", f"{share:.4f} ±", "The base has no trained head", "48 answers")
    for words in (*runs, *expected):
        assert words in shown
    assert "as_negative" not in shown
    assert "rows," not in shown


def test_no_file_is_left_behind_but_the_one_asked_for(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in runs["lora"].rglob("*")}
    assert main(["evaluate", str(runs["lora"])]) == 0
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in runs["lora"].rglob("*")} == before


def test_the_base_of_a_language_model_is_measured_as_it_comes(tmp_path: Path, decoder: Path) -> None:
    texts = ["patience is a river", "a slow river of three colours", "here works nothing"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    run = fitted(tmp_path / "runs", decoder, "lora", "data/english_quotes", data__source="sample:quotes")
    arguments = ["--source", tmp_path / "mine.jsonl", "--data", "PlainText", "--batch_size", 2]
    found = figures(tmp_path, run, *arguments)["rows"][0]
    model, words = LlamaForCausalLM.from_pretrained(decoder).eval(), AutoTokenizer.from_pretrained(decoder)
    losses = []
    for text in texts:
        ids = torch.tensor([*words(text)["input_ids"], words.eos_token_id])
        with torch.no_grad():
            losses += F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none").tolist()
    assert found["metrics"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve rows of three classes."""
    names = ("cold", "hot", "mild") * 4
    lines = (f"row {number} of a film{' again' * number}\t{name}\n" for number, name in enumerate(names))
    (tmp_path / "three.tsv").write_text("text\tlabel\n" + "".join(lines))
    return tmp_path / "three.tsv"


def test_a_folder_of_hf_peft_is_measured_on_data_that_is_given(tmp_path: Path, encoder: Path, rows: Path) -> None:
    import peft

    base = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)
    theirs = peft.get_peft_model(base, config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    on_it = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=3)
    on_it.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "base")
    found = figures(tmp_path, tmp_path / "theirs", "--base", tmp_path / "base", "--source", rows)["rows"][1]
    words, right = AutoTokenizer.from_pretrained(encoder), 0
    for number, line in enumerate(rows.read_text().splitlines()[1:]):
        with torch.no_grad():
            right += int(theirs(**words(line.split("\t")[0], return_tensors="pt")).logits.argmax()) == number % 3
    assert found["metrics"]["accuracy"] == pytest.approx(right / 12)
    assert found["answers"] == 12


def test_other_classes_than_the_datas_are_refused_by_the_adapters_name(
    runs: dict[str, Path], rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", f"feelings={runs['lora']}", "--data", "TextClassification", "--source", str(rows)]) == 2
    said = capsys.readouterr().err
    assert "The adapter 'feelings' tells 2 classes apart (negative, positive)" in said
    assert "3 (cold, hot, mild)" in said


def test_rows_from_elsewhere_a_split_and_a_limit(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "some.tsv").write_text("sentence\tlabel\n" + "a film to see\t1\nnothing works\t0\nhere\t1\n" * 5)
    arguments = [runs["lora"], "--source", tmp_path / "some.tsv"]
    whole = figures(tmp_path, *arguments)["rows"][1]
    assert whole["answers"] == 15
    tested = figures(tmp_path, *arguments, "--split", "test")["rows"][1]
    assert tested["metrics"] == whole["metrics"]
    few = figures(tmp_path, *arguments, "--limit", 5, "--batch_size", 4)
    assert few["rows"][1]["answers"] == 8
    assert few["data"]["limit"] == 5


def test_what_is_missing_or_wrong_is_said(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in (runs["lora"] / "adapter").iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other.yaml").write_text("data: {class_path: TextClasification, init_args: {source: a.tsv}}\n")
    (tmp_path / "task.yaml").write_text("model: {class_path: CausalLM}\ndata: {class_path: PlainText}\n")
    for arguments, expected in (
        ([alone], "It is not known on which data"),
        ([alone, "--source", tmp_path / "none.tsv"], "There is no file"),
        ([runs["lora"], "--config", tmp_path / "other.yaml"], "Did you mean 'TextClassification'"),
        ([runs["lora"], "--config", tmp_path / "task.yaml"], "is for CausalLM, but the adapters are on an"),
        ([runs["lora"], "--limit", 0], "at least 1; it is 0"),
        ([runs["lora"], "--splits", "test"], "Did you mean '--split'"),
    ):
        assert main(["evaluate", *map(str, arguments)]) == 2
        assert expected in capsys.readouterr().err


def test_a_configuration_that_was_not_named_runs_no_code_of_others(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    for file in runs["lora"].rglob("*"):
        if file.is_file() and "checkpoints" not in file.parts:
            (copy / file.relative_to(runs["lora"])).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(runs["lora"])).write_bytes(file.read_bytes())
    (tmp_path / "stranger.py").write_text("open('ran', 'w').close()\nfrom peftlight.data import SST2\n")
    text = (copy / "config.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    hidden = "{class_path: stranger.SST2, init_args: {source: sample:sentiment}}"
    for old, new, said in (
        ("peftlight.data.SST2", "stranger.SST2", "names the class stranger.SST2, which is not among those of"),
        ("peftlight.data.SST2", "peftlight.data.family.field", "names the class peftlight.data.family.field"),
        ("peftlight.tasks.Seq", "stranger.Seq", "names the class stranger.SequenceClassification, which is not"),
        ("tokenizer: null", f"tokenizer: {hidden}", "The tokenizer 'dict' is a slow one"),
        ("tokenizer: null", f"tokenizer: '{hidden}'", "Cannot load the tokenizer"),
        ("max_length: 128", "max_length: true", "max_length is True; expected int"),
        ("max_length: 128", "max_len: 128", "SST2 has no option 'max_len'. Did you mean 'max_length'"),
    ):
        assert old in text
        (copy / "config.yaml").write_text(text.replace(old, new))
        assert main(["evaluate", str(copy)]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "ran").exists()
    (copy / "config.yaml").write_text(text.replace("peftlight.data.SST2", "stranger.SST2"))
    assert main(["evaluate", str(copy), "--config", str(copy / "config.yaml")]) == 0
    assert (tmp_path / "ran").exists()


def test_a_configuration_that_was_not_named_does_not_say_where_files_are_written(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    copy, there = tmp_path / "copy", tmp_path / "written"
    for file in runs["lora"].rglob("*"):
        if file.is_file() and "checkpoints" not in file.parts:
            (copy / file.relative_to(runs["lora"])).parent.mkdir(parents=True, exist_ok=True)
            (copy / file.relative_to(runs["lora"])).write_bytes(file.read_bytes())
    text = (copy / "config.yaml").read_text()
    assert "cache_dir: null" in text
    (copy / "config.yaml").write_text(text.replace("cache_dir: null", f"cache_dir: {there}"))
    assert main(["evaluate", str(copy)]) == 0
    assert not there.exists()
    assert main(["evaluate", str(copy), "--config", str(copy / "config.yaml")]) == 0
    assert there.exists()


def test_every_option_of_data_is_known_to_say_what_rows_are_or_where_files_go() -> None:
    kinds = [kind for name in data.__all__ if issubclass(kind := getattr(data, name), data.DataFamily)]
    options = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert options == ROWS | {"cache_dir"}


@pytest.mark.parametrize(
    "damage",
    ["model: [1]", "model: {class_path: 3}", "data: {init_args: 3}", "trainer: []", "trainer: {precision: [16]}"],
)
def test_a_damaged_configuration_is_refused(damage: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(damage)
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"config\.yaml:.*(model|data|trainer|init_args)"):
        config_of_run(tmp_path)


def test_the_help_is_quick() -> None:
    code = """
import sys
from peftlight.cli import main
try:
    main(["evaluate", "--help"])
except SystemExit:
    pass
print(sorted({"torch", "lightning", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("[]")
    assert "--split" in done.stdout
