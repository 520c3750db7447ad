"""Which strategy serves which task on which architecture, found by doing it: `python tests/compatibility.py` writes it.

Each cell trains a tiny model for three steps by the task's own module and Lightning's Trainer, with the strategy of a
YAML, and sees that every trained tensor had a gradient.
"""

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import peftlight.tasks
from peftlight.errors import UserError
from peftlight.testing.models import CLASSES, inputs_for, make
from recipes import RECIPES
from tasks.small import loader, quiet_trainer

DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"
STEPS = 3
TASKS = {
    "SequenceClassification": ("bert", "roberta", "llama", "gpt2", "t5"),
    "TokenClassification": ("bert", "roberta", "llama", "gpt2", "t5"),
    "CausalLM": ("llama", "gpt2"),
    "Seq2Seq": ("t5",),
    "ImageClassification": ("vit", "convnext", "resnet"),
}
"""The tasks and the architectures that transformers has a class for."""
COLUMNS = [(task, architecture) for task, architectures in TASKS.items() for architecture in architectures]
_NATIVE = {("SequenceClassification", "bert"), ("SequenceClassification", "roberta")}
_INTRODUCTION = """# What works with what

Written by `make tables` from what ran: the strategy of each YAML in `configs/` on a tiny model of each architecture, by
the task's own module, three training steps, every trained tensor with a gradient. `tests/test_compatibility.py` runs
every cell again.
"""


def outcome(recipe: str, task: str, architecture: str) -> str:
    """ "" where the strategy trains the model for the task, else the reason why it was refused."""
    labels = {} if task in ("CausalLM", "Seq2Seq") else {"num_labels": CLASSES}
    batch = loader([dict(_inputs(task, architecture))])
    with TemporaryDirectory() as folder:
        trainer = quiet_trainer(Path(folder), max_epochs=STEPS)
        module = getattr(peftlight.tasks, task)(_model(task, architecture), RECIPES[recipe](), **labels)
        try:
            trainer.fit(module, batch)
        except UserError as error:
            return str(error)
    assert trainer.global_step == STEPS
    assert all(tensor.had_gradient for tensor in module.verdict.trained)
    return ""


def _model(task: str, architecture: str) -> nn.Module:
    native = make(architecture)
    if (task, architecture) in _NATIVE or task in ("CausalLM", "Seq2Seq", "ImageClassification"):
        return native
    torch.manual_seed(0)
    config = native.config
    config.pad_token_id, config.num_labels = 0, CLASSES
    if architecture == "t5":
        config.eos_token_id = 1
    model: nn.Module = getattr(transformers, f"AutoModelFor{task}").from_config(config)
    return model.eval()


def _inputs(task: str, architecture: str) -> Mapping[str, Tensor]:
    inputs = inputs_for(architecture)
    if task == "SequenceClassification":
        inputs["labels"] = inputs_for("bert")["labels"]
        if architecture == "t5":
            inputs["input_ids"][:, -3] = 1  # each row has one end
    if task == "TokenClassification":
        generator = torch.Generator().manual_seed(2)
        inputs["labels"] = torch.randint(0, CLASSES, inputs["input_ids"].shape, generator=generator)
    return inputs


@cache
def documented() -> dict[tuple[str, str, str], str]:
    """What the document says of each cell, as `outcome` does."""
    lines = DOCUMENT.read_text().splitlines()
    reasons = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
    cells = {}
    for line in [line for line in lines if line.startswith("| ")][2:]:
        recipe, *marks = [cell.strip() for cell in line.strip("| ").split(" | ")]
        for (task, architecture), mark in zip(COLUMNS, marks, strict=True):
            cells[recipe, task, architecture] = "" if mark == "yes" else reasons[mark.removeprefix("no ")]
    return cells


def written() -> str:
    """The whole document."""
    reasons: list[str] = []
    tasks = [f"{task}: {architecture}" for task, architecture in COLUMNS]
    lines = ["| strategy | " + " | ".join(tasks) + " |", "| --- |" + " --- |" * len(tasks)]
    for recipe in RECIPES:
        marks = [_mark(outcome(recipe, *column), reasons) for column in COLUMNS]
        lines.append(f"| {recipe} | " + " | ".join(marks) + " |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([_INTRODUCTION, *lines, "", "Refused before training, with these words:", "", *notes, ""])


def _mark(reason: str, reasons: list[str]) -> str:
    if not reason:
        return "yes"
    if reason not in reasons:
        reasons.append(reason)
    return f"no {reasons.index(reason) + 1}"


def main(arguments: list[str]) -> Any:
    """Write the document, or print it with --print."""
    text = written()
    return print(text) if "--print" in arguments else DOCUMENT.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
