"""The guide's example is the file beside it, keeps every promise, and trains by its class path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from peftlight.cli import main
from peftlight.testing import check_strategy
from tasks.small import QUIET

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLE = DOCS / "examples" / "ssf.py"

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning.pytorch.cli")]


_CHECK = """
from peftlight.testing import check_strategy
from peftlight.testing.conformance import CHECKS, Tiny
from peftlight.testing.models import inputs_for
from ssf import SSF

if __name__ == "__main__":
    print(*check_strategy(SSF, {"bert": (Tiny("bert"), inputs_for("bert"))}, leave_out=CHECKS))
"""


def test_the_guide_shows_the_file_which_is_short() -> None:
    assert EXAMPLE.read_text().rstrip() in (DOCS / "new-strategy.md").read_text()
    assert len([line for line in EXAMPLE.read_text().splitlines() if line.strip()]) <= 30


def test_the_example_keeps_every_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    from ssf import SSF

    results = check_strategy(SSF, leave_out=["two processes"])
    assert {result.outcome for result in results} == {"kept"}
    assert all("does not merge" in result.remark for result in results if result.check == "merges")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_yaml_trains_the_real_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLE.parent)
    limits = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", "--trainer.accelerator=cpu"]
    assert main(["fit", "--config", "ssf.yaml", f"--trainer.default_root_dir={tmp_path}", *limits]) == 0
    (run,) = tmp_path.iterdir()
    record = json.loads((run / "run.json").read_text())
    assert record["state"] == "finished"
    assert all(tensor["moved"] for tensor in record["audit"]["trained"])


@pytest.mark.slow
def test_the_check_with_processes(tmp_path: Path) -> None:
    """In a process of its own, as a user runs it: the started processes import the user's module."""
    script = tmp_path / "check.py"
    script.write_text(_CHECK)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(EXAMPLE.parent), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "bert, two processes: kept" in done.stdout
