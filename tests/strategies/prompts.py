"""What the tests of virtual tokens share: HF PEFT's names and tasks, rows padded on either side, greedy generation."""

from typing import Any

import torch
from torch import Tensor, nn

from models import VOCABULARY

TASKS = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama": "CAUSAL_LM", "llama_classifier": "SEQ_CLS",
         "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}  # fmt: skip
"""The task of HF PEFT for each tiny model."""


def endings(architecture: str, parts: dict[str, str]) -> dict[str, str]:
    """HF PEFT's names of a prompt encoder's `parts`, and ours with `compat: peft`."""
    site = "encoder." if architecture == "t5" else ""
    prompt = {f"prompt_encoder.default.{key}": f"{site}deltas.default.prompt.{part}" for key, part in parts.items()}
    return {**prompt, "base_model.": ""}


def heads(architecture: str) -> dict[str, Any]:
    """HF PEFT trains the head of a classifier beside the prompt."""
    if TASKS[architecture] != "SEQ_CLS":
        return {}
    return {"modules_to_train": ["score" if architecture == "llama_classifier" else "classifier"]}


def rows(lengths: tuple[int, ...] = (7, 3, 5)) -> list[Tensor]:
    """Rows (1, tokens) of different lengths."""
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, VOCABULARY, (1, length), generator=generator) for length in lengths]


def padded(rows: list[Tensor], side: str, token: int = 0) -> dict[str, Tensor]:
    """The rows as one batch with its mask."""
    width = max(row.shape[1] for row in rows)
    pads = [(0, width - row.shape[1]) if side == "right" else (width - row.shape[1], 0) for row in rows]
    ids = [nn.functional.pad(row, pad, value=token) for row, pad in zip(rows, pads, strict=True)]
    mask = [nn.functional.pad(torch.ones_like(row), pad) for row, pad in zip(rows, pads, strict=True)]
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}
