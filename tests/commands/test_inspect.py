"""`peftlight inspect`: what is said of an adapter, against figures computed here from the folded weights."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from commands.test_combine import base, on, read, saved  # noqa: F401  # base is a fixture
from commands.trained import COMMAND_LINE, fitted
from peftlight.cli import main
from peftlight.strategies import (
    IA3,
    BottleneckAdapter,
    Full,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Stack,
    TrainableTokens,
    VeRA,
)
from peftlight.strategy import PEFTStrategy

pytestmark = COMMAND_LINE
STRATEGIES: dict[str, PEFTStrategy] = {
    "LoRA": LoRA(rank=3, target_modules="all-linear", bias="all"),
    "VeRA": VeRA(rank=8),
    "IA3": IA3(),
    "Full": Full(),
    "LayerNormTuning": LayerNormTuning(),
    "TrainableTokens": TrainableTokens(token_indices=[3, 4]),
    "BottleneckAdapter": BottleneckAdapter(reduction_factor=4),
    "PrefixTuning": PrefixTuning(num_virtual_tokens=3),
    "PromptTuning": PromptTuning(num_virtual_tokens=2),
    "PTuning": PTuning(num_virtual_tokens=2),
    "Stack": Stack([LoRA(rank=2), IA3()]),
}


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def figures(folder: Path | str, tmp_path: Path, *options: str) -> Any:
    assert main(["inspect", "--traceback", str(folder), f"--json={tmp_path / 'figures.json'}", *options]) == 0
    return json.loads((tmp_path / "figures.json").read_text())


def test_the_figures_are_those_of_the_folded_weights(base: Path, tmp_path: Path) -> None:  # noqa: F811
    folder = saved(on(base, LoRA(rank=3, use_dora=True, target_modules="all-linear"), 1), base, tmp_path / "a")
    found = {row["name"]: row for row in figures(folder, tmp_path)["tensors"]}
    adapter = read(base, Path(folder))
    before = {name: value.detach().double() for name, value in adapter.model.named_parameters() if "deltas" not in name}
    adapter.merge()
    assert found.keys() == {f"{site}.weight" for site in adapter.sites}
    for site in adapter.sites:
        row, weight = found[f"{site}.weight"], before[f"{site}.weight"]
        change = adapter.model.get_parameter(f"{site}.weight").detach().double() - weight
        values = torch.linalg.svdvals(change)
        shares = values / values.sum()
        assert row["norm"] == pytest.approx(float(change.norm()), rel=1e-4)
        assert row["base"] == pytest.approx(float(weight.norm()))
        assert row["relative"] == pytest.approx(float(change.norm() / weight.norm()), rel=1e-4)
        assert row["effective_rank"] == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-3)
        assert row["rank"] == 32
        assert row["how"] == "LinearDoRA"
        assert row["parameters"] == sum(p.numel() for p in adapter.sites[site].parameters())


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_method_is_shown(
    name: str,
    base: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = on(base, STRATEGIES[name], 1)
    folder = saved(adapter, base, tmp_path / "a")
    state = adapter.finished().state()
    found = figures(folder, tmp_path, f"--picture={tmp_path / 'a.png'}")
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert said.splitlines()[0].strip() == name
    below = [
        line.split() for line in said[said.index("by kind") :].splitlines() if line.startswith("   ") and line.strip()
    ]
    assert all(len(words) > 2 for words in below)  # no name is folded into a second line
    assert found["method"] == name
    # IA3 scales biases too, and those of a new GPT-2 are zero.
    assert all(row["norm"] > 0 or row["base"] == 0 for row in found["tensors"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    counted = sum(row["parameters"] for row in found["tensors"])
    trained = sum(v.numel() for key, v in state.items() if ".shared." not in key and v.is_floating_point())
    assert counted == trained
    alone = figures(folder, tmp_path, "--files_only=true", f"--picture={tmp_path / 'files.png'}")
    assert {row["how"] for row in alone["tensors"]} == {"file"}
    assert sum(row["parameters"] for row in alone["tensors"]) == alone["values"]


def test_a_run_says_how_it_was_trained_and_a_head_is_new(
    encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = fitted(tmp_path / "runs", encoder, "lora", data__source="sample:sentiment")
    capsys.readouterr()
    found = figures(run, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    recorded = json.loads((run / "run.json").read_text())
    for part in ("SequenceClassification", "negative, positive", "sample:sentiment", recorded["started"], "val_loss",
                 "finished", "transformers "):  # fmt: skip
        assert part in said
    heads = [row for row in found["tensors"] if row["how"] == "new"]
    assert {row["name"] for row in heads} == {"classifier.weight", "classifier.bias"}
    assert all(row["base"] is None and row["norm"] > 0 for row in heads)
    assert found["run"]["state"] == "finished"


@pytest.mark.parametrize("name", ["no/such-model", None])
def test_without_its_base_the_files_speak(
    base: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str | None,
) -> None:
    folder = Path(saved(on(base, LoRA(rank=2), 1), base, tmp_path / "a"))
    record = json.loads((folder / "peftlight.json").read_text())
    record["base"]["name"] = name
    (folder / "peftlight.json").write_text(json.dumps(record))
    found = figures(folder, tmp_path)
    assert "The base is not there, so this is from the files alone" in capsys.readouterr().err
    assert {row["how"] for row in found["tensors"]} == {"file"}
    # A base that was asked for is not left out silently.
    assert main(["inspect", str(folder), "--base=no/such-model"]) == 2
    assert figures(folder, tmp_path, f"--base={base}")["tensors"][0]["how"] == "LinearLoRA"


def test_what_is_no_adapter_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert f"Cannot read the adapter in {tmp_path}: It has no adapter_config.json" in capsys.readouterr().err


def test_the_help_imports_nothing_heavy() -> None:
    code = """
import sys
from peftlight.cli import main
for command in ("inspect", "diff", "combine"):
    try:
        main([command, "--help"])
    except SystemExit:
        pass
print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("[]"), done.stdout[-500:] + done.stderr[-1000:]
