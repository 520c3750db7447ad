"""Tiny pretrained models in folders, and runs of `peftlight fit` on them, for the tests of what comes afterwards."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from bases import tokenizer
from models import make
from peftlight.cli import main
from recipes import CONFIGS
from tasks.small import QUIET

COMMAND_LINE = [
    *QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
_LEAST = {"trainer.accelerator": "cpu", "trainer.max_epochs": 1, "trainer.limit_train_batches": 3,
          "trainer.num_sanity_val_steps": 0, "trainer.log_every_n_steps": 1, "optimizer.lr": 0.02}  # fmt: skip


def gpt2_in(folder: Path) -> Path:
    """A GPT-2 that takes any token in any place, unlike the tiny one of `models`."""
    config = GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=2, eos_token_id=3)
    make("gpt2")  # sets the seed
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def fitted(root: Path, base: Path, strategy: str, *overlays: str, **options: object) -> Path:
    """The folder of a run; `strategy` and `overlays` name files of configs/, `__` in an option stands for a dot."""
    given = {name.replace("__", "."): value for name, value in options.items()}
    flags = {"model.base_model": base, "trainer.default_root_dir": root, **_LEAST, **given}
    configs = [f"--config={CONFIGS / name}.yaml" for name in (strategy, *overlays)]
    before = set(root.iterdir()) if root.is_dir() else set()
    assert main(["fit", "--traceback", *configs, *(f"--{name}={value}" for name, value in flags.items())]) == 0
    (run,) = set(root.iterdir()) - before
    return run


def lightning(command: str, run: Path, root: Path, *flags: str) -> Path:
    """The folder that Lightning's own command (validate, test, predict) writes for the checkpoint of a run."""
    before = set(root.iterdir()) if root.is_dir() else set()
    own = [f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}"]
    assert main([command, "--traceback", *own, f"--trainer.default_root_dir={root}", *flags]) == 0
    (made,) = set(root.iterdir()) - before
    return made


def metrics_of(run: Path, prefix: str = "val_") -> dict[str, float]:
    """The metrics of a stage that a run ended with, without the stage's prefix."""
    metrics: dict[str, Any] = json.loads((run / "run.json").read_text())["metrics"]
    return {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
