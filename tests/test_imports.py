"""The arrows of docs/architecture.md, held by reading the import statements; and what must stay unimported."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "peftlight"

# A room may import from those that stand after it in its line.
FREE = {"environment", "errors", "files", "gather", "locks", "shards", "signals"}
ROOMS = {
    "linear": set(),
    "delta": {"class_paths"},
    "checked_hooks": {"delta"},
    "fold_check": {"class_paths", "delta", "linear"},
    "architectures": set(),
    "paths": set(),
    "layer_ranges": {"paths"},
    "candidates": {"linear", "paths"},
    "coverage": {"linear", "paths"},
    "targets": {"architectures", "candidates", "coverage", "paths", "layer_ranges"},
    "head_size": {"paths"},
    "wrappers": set(),
    "turns": {"delta", "wrappers"},
    "strategy": {
        "checked_hooks",
        "class_paths",
        "delta",
        "fold_check",
        "head_size",
        "linear",
        "paths",
        "targets",
        "turns",
        "wrappers",
    },
    "positions": set(),
    "reach": set(),
    "train_mode": {"strategy"},
    "unreached": {"candidates", "paths", "strategy", "targets"},
    "liveness": {"reach", "strategy", "unreached"},
    "finite": set(),
    "divergence": {"finite"},
    "matrices": {"delta"},
    "updates": {"fold_check", "matrices", "strategy", "delta", "linear", "paths"},
    "combine": {"updates", "matrices", "strategy", "strategies", "delta", "paths", "turns"},
    "blocks": {"paths", "linear"},
    "strategies": {
        "candidates",
        "paths",
        "strategy",
        "delta",
        "targets",
        "blocks",
        "linear",
        "attention",
        "entrance",
        "virtual_tokens",
    },
    "attention": set(),
    "virtual_tokens": {"delta"},
    "entrance": {"virtual_tokens", "delta", "paths"},
    "typed": set(),
    "own_modules": set(),
    "class_paths": {"own_modules"},
    "strategy_spec": {"class_paths", "strategy", "strategies", "typed"},
    "log_once": set(),
    "quantization": {"linear", "log_once", "paths", "targets", "typed"},
    "loading_errors": set(),
    "new_head": {"paths"},
    "packaged": set(),
    "pretrained": {"loading_errors", "new_head", "packaged", "paths", "quantization"},
    "interop": {
        "class_paths",
        "finite",
        "head_size",
        "paths",
        "strategy",
        "strategy_spec",
        "strategies",
        "delta",
        "linear",
        "targets",
        "turns",
        "typed",
        "virtual_tokens",
        "wrappers",
    },
    "report": {"coverage", "strategy", "delta", "linear", "paths"},
    "console": set(),
    "checkpoint_files": {"console"},
    "watching": set(),
    "random_state": set(),
    "environment_options": set(),
    "tasks": {
        "checkpoint_files",
        "linear",
        "random_state",
        "watching",
        "divergence",
        "finite",
        "paths",
        "positions",
        "strategy",
        "strategy_spec",
        "liveness",
        "new_head",
        "pretrained",
        "quantization",
        "train_mode",
        "typed",
        "wrappers",
    },
    "data": set(),
    "run_folder": set(),
    "resume": {
        "checkpoint_files",
        "config_errors",
        "console",
        "handover",
        "interop",
        "strategy",
        "strategy_spec",
        "tasks",
        "typed",
    },
    "callbacks": {
        "class_paths",
        "resume",
        "random_state",
        "strategy_spec",
        "watching",
        "divergence",
        "quantization",
        "tasks",
        "report",
        "console",
        "handover",
        "interop",
    },
    "config_errors": {"tasks", "data"},
    "class_changes": {"config_errors"},
    "row_order": set(),
    "rows": {"delta", "linear", "row_order", "strategy"},
    "adapters": {"combine", "interop", "rows", "strategy", "turns", "wrappers"},
    "merging": {"delta", "interop", "linear", "paths", "pretrained", "strategy", "strategy_spec"},
    "handover": {"class_paths", "interop", "merging", "pretrained", "strategies"},
    "opening": set(),
    "opened": {"adapters", "handover", "interop", "opening", "pretrained", "quantization"},
    "writing": {"console", "data", "interop", "opened", "opening", "typed"},
    "measuring": {"delta", "interop", "matrices", "paths", "strategy", "updates"},
    "on_data": {
        "class_paths",
        "config_errors",
        "data",
        "interop",
        "opened",
        "opening",
        "own_modules",
        "pretrained",
        "strategy",
        "tasks",
        "typed",
    },
    "merged": {"interop", "merging", "opened", "opening", "pretrained"},
    "proofs": {
        "callbacks",
        "checkpoint_files",
        "console",
        "interop",
        "merged",
        "merging",
        "opened",
        "opening",
        "own_modules",
        "pretrained",
        "resume",
        "shards",
        "tasks",
        "typed",
    },
    "commands": {
        "callbacks",
        "combine",
        "config_errors",
        "console",
        "handover",
        "interop",
        "measuring",
        "merged",
        "merging",
        "on_data",
        "opened",
        "opening",
        "own_modules",
        "pretrained",
        "proofs",
        "writing",
    },
    "processes": {"blocks", "strategy", "tasks"},
    "cli": {"class_paths", "own_modules", "resume", "lightning_cli", "config_errors", "commands", "watching"},
    "lightning_cli": {
        "own_modules",
        "console",
        "environment_options",
        "watching",
        "processes",
        "tasks",
        "data",
        "callbacks",
        "strategies",
        "config_errors",
        "checkpoint_files",
        "class_changes",
        "resume",
        "run_folder",
    },
    "testing": {"fold_check", "strategy", "delta", "interop", "pretrained", "train_mode", "wrappers"},
    "__main__": {"cli"},
    "__init__": {"adapters", "handover", "interop", "strategy"},
}
NEVER = {"peft"}
HEAVY_BELOW = {"lightning", "transformers", "datasets", "bitsandbytes"}
"""What a strategy and everything under it must not know."""
KNOW_NO_FRAMEWORK = {"linear", "delta", "targets", "blocks", "architectures", "strategy", "strategies"}
KNOW_NO_FRAMEWORK |= {"virtual_tokens", "entrance", "paths", "head_size", "layer_ranges", "liveness"}
KNOW_NO_FRAMEWORK |= {"candidates", "coverage", "train_mode", "turns", "wrappers"}
KNOW_NO_FRAMEWORK |= {"matrices", "updates", "combine"}


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_arrows_point_down(path: Path) -> None:
    room = room_of(path)
    reached = {name.split(".")[1] for name in imports(path) if name.startswith("peftlight.")}
    rooms = {name for name in reached if (SOURCE / name).exists() or (SOURCE / f"{name}.py").exists()}
    assert not rooms - ROOMS.get(room, set()) - FREE - {room}


def test_no_arrow_leads_back() -> None:
    TopologicalSorter(ROOMS).prepare()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nobody_imports_the_oracle_and_strategies_know_no_framework(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & NEVER
    if room_of(path) in KNOW_NO_FRAMEWORK:
        assert not roots & HEAVY_BELOW


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["fit", "--help"], ["predict", "-h"], ["fot"]])
def test_small_answers_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from peftlight.cli import main
main({arguments!r})
print(sorted({{'torch', 'lightning', 'transformers', 'jsonargparse'}} & set(sys.modules)))
"""
    assert run_python(code).strip().endswith("[]")


def test_training_on_tensors_needs_neither_datasets_nor_bitsandbytes() -> None:
    code = """
import sys, warnings
warnings.simplefilter("ignore")

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("datasets", "bitsandbytes"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM

config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
ids = torch.randint(0, 50, (8, 6))
rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
module = CausalLM(LlamaForCausalLM(config), LoRA())
trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(module, DataLoader(rows, batch_size=4))
print(trainer.global_step, {"datasets", "bitsandbytes"} & set(sys.modules))
"""
    assert run_python(code).strip().endswith("2 set()")
