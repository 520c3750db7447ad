"""The options that all commands share reach the adapters, whichever command opens them."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands.trained import COMMAND_LINE
from commands.writers import adapter_in, base_in, loaded
from peftlight.cli import main
from peftlight.strategies import LoRA

pytestmark = COMMAND_LINE
WORDS = {
    "generate": ["ADAPTER", "--prompt", "a film", "--max_new_tokens", "2"],
    "chat": ["ADAPTER", "--max_new_tokens", "2"],
    "predict": ["ADAPTER", "ROWS", "--data", "PlainText"],
    "evaluate": ["ADAPTER", "--source", "ROWS", "--data", "PlainText"],
    "inspect": ["ADAPTER"],
    "diff": ["one=ADAPTER", "two=ADAPTER"],
    "combine": ["one=ADAPTER", "two=ADAPTER", "OUT"],
    "merge": ["ADAPTER", "OUT", "--tolerance", "0.01"],
}
"""Each command that opens adapters, with what it needs."""


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and another of the same shape, an adapter of the first, and the same one as a pickle without a record."""
    room = tmp_path_factory.mktemp("shelf")
    base, other = base_in(room / "base", "llama"), base_in(room / "other", "llama")
    changed = loaded(other)
    changed.get_parameter("model.norm.weight").data += 1
    changed.save_pretrained(other)  # type: ignore[operator]
    adapter_in(room / "adapter", base, LoRA(rank=2))
    pickled = adapter_in(room / "pickled", base, LoRA(rank=2))
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    config = json.loads((pickled / "adapter_config.json").read_text())
    (pickled / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    (pickled / "adapter_model.safetensors").unlink()
    (pickled / "peftlight.json").unlink()
    (room / "rows.jsonl").write_text('{"text": "a film to see again"}\n' * 3)
    return room


def ran(command: str, adapter: Path, room: Path, patch: pytest.MonkeyPatch, *options: object) -> int:
    given = {"ADAPTER": str(adapter), "OUT": str(room / "out"), "ROWS": str(adapter.parent / "rows.jsonl")}
    words = [word.replace("ADAPTER", given["ADAPTER"]) if "ADAPTER" in word else given.get(word, word)
             for word in WORDS[command]]  # fmt: skip
    patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a film\n")))
    return main([command, *words, *map(str, options)])


@pytest.mark.parametrize("command", WORDS)
def test_another_base_is_taken_when_asked_for(
    command: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, base = shelf / "adapter", ("--base", shelf / "other")
    assert ran(command, adapter, tmp_path, monkeypatch, *base) == 2
    assert "--other_base true" in capsys.readouterr().err
    assert ran(command, adapter, tmp_path, monkeypatch, *base, "--other_base", "true") == 0


@pytest.mark.parametrize("command", WORDS)
def test_a_pickle_is_read_when_asked_for(
    command: str, shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ran(command, shelf / "pickled", tmp_path, monkeypatch) == 2
    assert "--convert_pickle true" in capsys.readouterr().err
    assert ran(command, shelf / "pickled", tmp_path, monkeypatch, "--convert_pickle", "true") == 0


def test_a_pickle_is_inspected_without_its_base(
    shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--files_only", "true", "--convert_pickle", "true", "--json", tmp_path / "found.json")
    assert ran("inspect", shelf / "pickled", tmp_path, monkeypatch, *options) == 0
    tensors = load_file(shelf / "adapter" / "adapter_model.safetensors")
    assert json.loads((tmp_path / "found.json").read_text())["values"] == sum(map(torch.numel, tensors.values()))


def test_the_help_of_all_has_the_options_and_imports_nothing_heavy() -> None:
    code = f"""
import sys
from peftlight.cli import main
for command in {list(WORDS)}:
    try:
        main([command, *["a"] * (command == "predict"), "--help"])
    except SystemExit:
        print("ended")
print(sorted({{"torch", "lightning", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip().endswith("[]"), done.stderr
    *helps, _ = done.stdout.split("ended")
    assert len(helps) == len(WORDS)
    for option in ("--base BASE", "--revision", "--trust_remote_code", "--dtype", "--other_base", "--convert_pickle"):
        assert all(option in text for text in helps), option
    assert all("whether a pickle of tensors is read" in " ".join(text.split()) for text in helps)
