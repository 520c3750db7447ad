"""`peftlight verify` on a tiny encoder, and what pytest is to overlook in it."""

from pathlib import Path

import pytest

from peftlight.cli import main
from recipes import CONFIGS
from tasks.small import QUIET

PROOF = [
    pytest.mark.slow,
    *QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of transformers and HF PEFT, about each other
]
SENTENCES = ["--data.source=sample:sentiment", "--data.batch_size=4", "--optimizer.lr=0.01"]
LANGUAGE = ["--config", str(CONFIGS / "data" / "alpaca.yaml"), "--data.source=sample:instructions",
            "--data.batch_size=2"]  # fmt: skip


def verify(what: str, strategy: str, base: Path, *flags: str) -> int:
    """The exit code of a proof on one of the strategies of configs/, or on one of `methods`."""
    config, own = ("lora", [f"--model.strategy=proofs.methods.{strategy}"]) if strategy[0].isupper() else (strategy, [])
    given = [f"--config={CONFIGS / config}.yaml", *own, *flags, f"--model.base_model={base}"]
    return main(["verify", what, "--traceback", *given, "--trainer.accelerator=cpu"])
