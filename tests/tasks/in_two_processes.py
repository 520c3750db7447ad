"""Run by torchrun in each of two processes: trains, resumes, and says as JSON what differs."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

import peftlight.processes  # noqa: E402, F401  # which brings fsdp2
from peftlight.strategies import AdaLoRA  # noqa: E402
from tasks.resuming import Theirs, same, train, train_uneven  # noqa: E402

TRAININGS: dict[str, dict[str, Any]] = {
    "ours": {"accumulate_grad_batches": 2, "val_check_interval": 2},
    "theirs": {"data": Theirs, "accumulate_grad_batches": 2, "max_epochs": 1},
    "AdaLoRA": {
        "strategy": lambda: AdaLoRA(init_r=4, target_r=2, dropout=0.1, initial_phase=1, final_phase=1),
        "max_epochs": 1,
    },
    "FSDP2": {"trainer_strategy": "fsdp2", "accumulate_grad_batches": 2, "max_epochs": 1},
}


def resumed(folder: Path, name: str) -> list[str]:
    """The checkpoints from which the training went on in another way."""
    place = folder / name
    place.mkdir(exist_ok=True)
    options = {"trainer_strategy": "ddp", "devices": 2, **TRAININGS[name]}
    whole, saved = train(place, save=place, **options)
    wrong = []
    for checkpoint, events in saved.items():
        again, _ = train(place, place / f"{checkpoint}.ckpt", **options)
        rest = whole.events[events:]
        rest = rest[1:] if "batch_end" in checkpoint and rest and rest[0][0] == "logged" else rest
        if not same(vars(again), {**vars(whole), "events": rest}):
            wrong.append(checkpoint)
    return wrong


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    found: dict[str, Any] = {name: resumed(folder, name) for name in TRAININGS}
    uneven = train_uneven(folder, 3, trainer_strategy="ddp", devices=2)
    found["events"] = [event for event in uneven.events if event[0] in ("rows", "logged")]
    if rank == 0:
        torch.save(uneven.trained, folder / "uneven.pt")
    (folder / f"found_{rank}.json").write_text(json.dumps(found))
