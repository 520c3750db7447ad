"""The model card: what the run's files say and nothing else, whatever characters stand in them; a person's is kept."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file

import peftlight
from models import inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.callbacks import RunRecord
from peftlight.errors import UserError
from peftlight.handover.model_card import is_untouched, model_card, write_card
from peftlight.strategies import BottleneckAdapter, LoRA
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, batches, class_rows, constant, loader, quiet_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty")]
BASE = "someone/tiny-bert"
EVIL = 'a `tick`: "x" | #y\n---\n```\nlicense: mit <!-- -->'
"""What would break YAML, tables, code and the front matter's end."""


def saved(folder: Path, record: dict[str, Any], strategy: Any = None, model: str = "bert") -> Path:
    made = attach(make(model), strategy or LoRA(rank=2))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters().values():
            parameter.normal_(std=0.3)
    save_adapter(made, folder, record)
    return folder


def known(**more: Any) -> dict[str, Any]:
    base = {"name": BASE, "revision": "v1", "auto_class": "AutoModelForSequenceClassification"}
    return {"base": base, "task": "SequenceClassification", "label_names": ["cold", "mild", "hot"], **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with a record such as a fit leaves."""
    data = {"source": "someone/weather", "fingerprint": "f" * 64}
    saved(tmp_path / "run" / "adapter", known(data=data, steps=12, seed=7, metrics={"val_accuracy": 0.5}))
    record = {
        "state": "finished", "precision": "bf16-mixed", "processes": 2,
        "versions": {"torch": "2.13.0", "lightning": None},
        "metrics": {"val_accuracy": 0.8333333, "val_loss": 0.25, "train_loss": 0.5, "lr": 0.1, "broken": float("nan")},
        "data": {"train": {"rows": 100, "kept": 99, "truncated": 3, "tokens": 1234}},
        "audit": {"trained": [{"moved": True}, {"moved": False}], "base_checksum": "abcdef"},
        "trained": [{"modules": "bert.*.query", "count": 2, "trained": "LinearLoRA", "parameters": 256, "size": 1024}],
    }  # fmt: skip
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    settings = {
        "model": {"init_args": {"strategy": {"class_path": "peftlight.strategies.LoRA", "init_args": {"rank": 2}}}},
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "fused": None}},
        "trainer": {"max_epochs": 4},
        "data": {"init_args": {"batch_size": 16, "source": "/home/me/secret.csv"}},
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run"


def front(card: str) -> dict[str, Any]:
    """The front matter as the hub's own reader finds it."""
    return dict(ModelCard(card, ignore_metadata_errors=False).data.to_dict())


def test_the_front_matter(run: Path) -> None:
    read = yaml.safe_load(model_card(run).split("---\n")[1])
    assert read == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["peftlight", "lora"],
        "datasets": ["someone/weather"],
        "metrics": ["accuracy", "loss"],
        "model-index": [{
            "name": "LoRA",
            "results": [{
                "task": {"type": "text-classification"},
                "dataset": {"type": "someone/weather", "name": "someone/weather", "split": "validation"},
                "metrics": [{"type": "accuracy", "value": 0.833333}, {"type": "loss", "value": 0.25}],
            }],
        }],
    }  # fmt: skip
    (accuracy, loss) = ModelCard(model_card(run), ignore_metadata_errors=False).data.eval_results
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == ("accuracy", 0.833333, "validation")
    assert loss.metric_value == 0.25


def test_what_the_run_says_is_said_and_nothing_else(run: Path) -> None:
    card = model_card(run)
    for said in (
        f"# LoRA for `{BASE}`", f"`{BASE}`, revision `v1`", "`cold`, `mild`, `hot`", "f" * 64, "train: 99 of 100 rows",
        "3 of them cut", "optimizer steps: 12", "seed: 7", "precision: bf16-mixed", "processes: 2", "torch 2.13.0",
        "lr: 0.001", "batch_size: 16", "max_epochs: 4", "| `val_accuracy` | 0.833333 |", "1 of 2 trained tensors moved",
        "`abcdef`", "| `bert.*.query` | 2 | LinearLoRA | 256 |",
        f"{sum(tensor.numel() for tensor in load_file(run / 'adapter' / 'adapter_model.safetensors').values())} values",
    ):  # fmt: skip
        assert said in card, said
    for unsaid in ("license:", "lightning", "broken", "nan", "`lr`", "fused", "secret", "None", "null", "hardware"):
        assert unsaid not in card, unsaid


def test_an_adapter_that_stands_alone_says_what_its_own_files_say(tmp_path: Path) -> None:
    folder = saved(tmp_path / "alone", {})
    card, told = model_card(folder), {"library_name": "peft", "tags": ["peftlight", "lora"]}
    assert front(card) == {**told, "pipeline_tag": "text-classification"}
    for title in ("Measured", "Audit"):
        assert f"## {title}" not in card
    assert "None" not in card
    (folder / "peftlight.json").unlink()
    assert front(model_card(folder)) == {**told, "pipeline_tag": "text-classification"}  # by HF PEFT's own words
    saved(tmp_path / "text", {}, model="t5")
    assert front(model_card(tmp_path / "text")) == told


def test_a_format_of_our_own_is_not_called_hf_pefts(tmp_path: Path) -> None:
    card = model_card(saved(tmp_path, known(), BottleneckAdapter()))
    assert front(card)["library_name"] == "peftlight"
    assert "from peft import" not in card


def test_the_same_files_give_the_same_bytes(run: Path) -> None:
    first = model_card(run)
    (run / "adapter" / "README.md").write_text("anything")
    assert model_card(run) == model_card(run / "adapter") == first


@pytest.mark.parametrize("where", ["data", "base", "labels", "run"])
def test_no_text_of_the_users_is_taken_for_markup(run: Path, where: str) -> None:
    record = known(data={"source": "someone/weather", "fingerprint": "f" * 64})
    if where == "data":
        record["data"]["source"] = EVIL
    elif where == "base":
        record["base"]["name"] = EVIL.replace("\n", " ")
    elif where == "labels":
        record["label_names"] = [EVIL, "b", "c"]
    else:
        told = json.loads((run / "run.json").read_text())
        told["metrics"] = {f"val_{EVIL}": 1.0}
        told["trained"][0]["modules"] = EVIL
        (run / "run.json").write_text(json.dumps(told))
    saved(run / "adapter", record)
    card = model_card(run)
    read = front(card)
    assert "license" not in read
    assert read["library_name"] == "peft"
    assert is_untouched(card.encode())
    titles = [line for line in outside_of_code(card) if line.startswith("#")]
    assert titles[1:] == [f"## {name}" for name in ("Training", "Measured", "Audit", "Size", "Use", "Limits")]
    assert sum("<!--" in line for line in outside_of_code(card)) == 1
    rows = [line for line in outside_of_code(card) if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} <= {3, 5}


def outside_of_code(card: str) -> list[str]:
    """The lines of the body that are no code, without the code within them, by CommonMark's rules for fences."""
    lines, fence = [], ""
    for line in card.partition("\n---\n")[2].splitlines():
        opened = re.match(r"`{3,}", line)
        if fence:
            fence = "" if line == fence else fence
        elif opened:
            fence = opened[0]
        else:
            lines.append(re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", line))
    assert not fence
    return lines


def test_paths_of_this_machine_are_not_told(run: Path, tmp_path: Path) -> None:
    local = tmp_path / "models" / "mine"
    local.mkdir(parents=True)
    record = known(data={"source": str(tmp_path / "rows.csv"), "fingerprint": None})
    record["base"]["name"] = str(local)
    saved(run / "adapter", record)
    card = model_card(run)
    assert str(tmp_path) not in card
    assert "`mine`" in card
    assert "`rows.csv`" in card
    assert "base_model" not in front(card)
    assert "datasets" not in front(card)
    assert front(model_card(run, "someone/else"))["base_model"] == "someone/else"


def code_of(card: str, importing: str) -> str:
    return next(code for code in re.findall(r"```python\n(.*?)\n```", card, re.DOTALL) if importing in code)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # in HF PEFT
def test_the_code_on_the_card_runs_and_gives_the_adapters_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both pieces, with a base in a folder whose relative name has the form of a hub id."""
    monkeypatch.chdir(tmp_path)
    record = known()
    record["base"]["revision"] = None
    folder = saved(tmp_path / "mine", record)
    card = model_card(folder)
    make("bert").save_pretrained(tmp_path / BASE)
    model, inputs = make("bert"), inputs_for("bert")
    load_adapter(model, folder)
    with torch.no_grad():
        wanted = model(**inputs).logits
        for importing in ("peftlight", "peft import PeftModel"):
            scope: dict[str, Any] = {}
            exec(code_of(card, importing).replace('"ADAPTER"', repr(str(folder))), scope)
            assert (scope["model"](**inputs).logits - wanted).abs().max() < 1e-6


def test_ours_is_written_again_and_a_persons_is_kept(run: Path) -> None:
    card = run / "adapter" / "README.md"
    assert write_card(run)
    assert card.read_text() == model_card(run)
    saved(run / "adapter", known(seed=8))
    assert write_card(run)
    assert "seed: 8" in card.read_text()
    for text in (card.read_text().replace("seed: 8", "seed: 9"), "mine\n", "", card.read_text() + "and mine\n"):
        card.write_text(text)
        assert not write_card(run)
        assert card.read_text() == text
    card.write_bytes(b"\xff\xfe no text")
    assert not write_card(run)


@pytest.mark.parametrize(("file", "text"), [("run.json", "{"), ("config.yaml", "a: [")])
def test_a_damaged_record_is_our_error(run: Path, file: str, text: str) -> None:
    (run / file).write_text(text)
    with pytest.raises(UserError, match=f"{file} cannot be read"):
        model_card(run)


def test_a_fit_leaves_a_card(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    record = RunRecord(folder, "trainer:\n  max_epochs: 1\n", ["fit"], seed=7)
    logger = CSVLogger(folder.parent, name="", version=folder.name)
    trainer = quiet_trainer(folder.parent, [record], logger=logger)
    module = SequenceClassification(make("bert"), LoRA(rank=2), lr_scheduler=constant)
    trainer.fit(module, loader(batches(class_rows([5, 9, 4, 12], [0, 1, 2, 1]), 2)))
    card = folder / "adapter" / "README.md"
    assert card.read_text() == model_card(folder)
    assert "seed: 7" in card.read_text()
    assert "train_loss" in card.read_text()
    assert peftlight.__version__ in card.read_text()
