"""A run of the command line that goes wrong: the message, the run folder, and what is not in it."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from bases import save_encoder
from peftlight.cli import main
from processes.ranks import Ranks
from tasks.small import QUIET

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]
CONFIG = Path(__file__).parents[2] / "configs" / "lora.yaml"
ROWS = 12
POISONED = 6
"""The row with the word that the base cannot compute with."""


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Rows of which one has a token whose embedding is too large, and a training on them in four steps."""
    base = save_encoder(tmp_path / "base")
    token = AutoTokenizer.from_pretrained(base)("~", add_special_tokens=False)["input_ids"][-1]
    tensors = load_file(base / "model.safetensors")
    tensors["embeddings.word_embeddings.weight"][token] = 3e38
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    rows = [f"row {'~' if number == POISONED else 'so'} {number}\t{number % 2}" for number in range(ROWS)]
    (tmp_path / "rows.tsv").write_text("\n".join(["sentence\tlabel", *rows]) + "\n")
    (tmp_path / "good.tsv").write_text("\n".join(["sentence\tlabel", *rows[:4]]) + "\n")
    return [
        f"--model.base_model={base}",
        f"--data.source={tmp_path / 'rows.tsv'}",
        f"--data.validation_source={tmp_path / 'good.tsv'}",
        "--data.batch_size=2",
        f"--trainer.default_root_dir={tmp_path / 'runs'}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=1",
        "--trainer.log_every_n_steps=1",
    ]


def of_the_only_run(tmp_path: Path) -> tuple[Path, dict[str, object]]:
    (run,) = (tmp_path / "runs").iterdir()
    return run, json.loads((run / "run.json").read_text())


def test_the_error_names_file_and_line_and_the_run_keeps_the_batch(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", str(CONFIG), *flags]) == 2
    error = capsys.readouterr().err
    assert re.search(r"error: Training was stopped before step \d: the loss is not finite \(nan\)", error)
    line = POISONED + 2  # the first one has the names of the columns
    assert f"row {POISONED} ({tmp_path / 'rows.tsv'}, line {line}): " in error
    assert "Traceback" not in error
    run, record = of_the_only_run(tmp_path)
    assert record["state"] == "failed"
    assert "the loss is not finite" in str(record["error"])
    assert POISONED in load_file(run / "failed_batch.safetensors")["row"]
    assert not (run / "adapter").exists()
    for file in run.glob("checkpoints/*.ckpt"):
        state = torch.load(file, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


def test_the_guards_settings_come_from_the_configuration(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--trainer.callbacks+=Guard", "--trainer.callbacks.idle_steps=0"]
    assert main(["fit", "--config", str(CONFIG), *flags, *more]) == 2
    assert "Guard's idle_steps is at least 1; got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_end_with_the_one_message(flags: list[str], tmp_path: Path) -> None:
    ranks = Ranks(2, ["fit", "--config", str(CONFIG), *flags, "--trainer.strategy=ddp"], tmp_path)
    assert ranks.ended() == [2, 2]
    said = ranks.said()[0]
    assert "the loss is not finite (nan)" in said
    assert re.search(rf"Process [01], micro-batch 1 of 1, loss nan:\n(  row .*\n)*  row {POISONED} \(", said)
    run, record = of_the_only_run(tmp_path)
    assert record["state"] == "failed"
    assert POISONED in load_file(run / "failed_batch.safetensors")["row"]
