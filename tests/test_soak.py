"""The soak of benchmarks/soak.py for half a minute; an hour of it is in benchmarks/results."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOAK = Path(__file__).parents[1] / "benchmarks" / "soak.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="what is held is measured by Linux' own count")
def test_a_training_with_a_checkpoint_after_every_step_holds_no_more_as_time_goes_by(
    tmp_path: Path, encoder: Path
) -> None:
    command = [sys.executable, "-W", "ignore", SOAK, "--minutes", "0.4", "--base_model", encoder]
    done = subprocess.run([*command, "--out", tmp_path / "soak.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "soak.json").read_text())
    assert len(found["samples"]) > 10
    assert found["steps"] > 20
    assert {each["files"] for each in found["samples"][-10:]} == {7}


def test_what_grows_is_noticed() -> None:
    spec = importlib.util.spec_from_file_location("soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    soak: Any = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = soak
    spec.loader.exec_module(soak)
    still = [soak.Sample(second, second, 500.0, 8, 1, 7) for second in range(100)]
    leaking = [soak.Sample(second, second, 500.0 + second, 8 + second // 20, 1, 7) for second in range(100)]
    assert set(soak.growth(still).values()) == {0}
    grown = soak.growth(leaking)
    assert grown["memory"] > soak.MAY_GROW["memory"]
    assert grown["open_files"] > 0 == grown["files"]
