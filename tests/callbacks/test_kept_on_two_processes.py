"""What two processes keep of a training: one state, validated by both; and what they unfreeze in its middle."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim import SGD

from callbacks.test_what_is_kept import BIAS, TRAINED, VALIDATED, new_task, of_the_saved, recorded_metrics
from models import make
from peftlight.callbacks import RunRecord
from peftlight.gather import gathered
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from processes.worlds import spawn
from tasks.small import Rows, batches, constant, loader, quiet_trainer
from tasks.test_unfreezing import DENSE, ByHand

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (list, {}),
    "ema": (lambda: [EMAWeightAveraging(decay=0.7)], {}),
    "first alone": (lambda: [FirstAlone()], {}),
    "below an epoch": (list, {"max_steps": 2}),
}


class FirstAlone(Callback):
    """As a user writes it who has read of files: the first process alone does it."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            pl_module.get_parameter(BIAS).data.copy_(torch.tensor([0.0, 7.0, 0.0]))


class Share(Rows):
    """Of each batch of two rows, the one of this process; of the validation's six, every other."""

    def __init__(self, rank: int, processes: int) -> None:
        super().__init__(batches(TRAINED[rank::processes], 2 // processes))
        self.validated = [*VALIDATED, VALIDATED[0] | {"labels": -100}][rank::processes]  # as the families fill up

    def val_dataloader(self) -> Any:
        return loader(batches(self.validated, 1))


def one_process(rank: int, processes: int, folder: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 2, "devices": processes, "use_distributed_sampler": False}
    for name, (callbacks, more) in CASES.items() if processes > 1 else ():
        torch.manual_seed(0)
        record = RunRecord(folder / name, "", ["fit"], seed=7)
        trainer = quiet_trainer(folder, [record, *callbacks()], strategy="ddp", **options, **more)
        task = new_task()
        trainer.fit(task, Share(rank, processes))
        own = {key: value.clone() for key, value in task.adapter.state().items()}
        one, other = gathered(own)
        assert all(torch.equal(one[key], other[key]) for key in one), name
    task = SequenceClassification(
        make("bert"), LoRA(rank=2), optimizer=partial(SGD, lr=0.5), lr_scheduler=constant, num_labels=3
    )
    strategy = "ddp" if processes > 1 else "auto"
    quiet_trainer(folder, [ByHand(step=2)], strategy=strategy, **options).fit(task, Share(rank, processes))
    assert f"{DENSE}.weight" in task.adapter.trained
    torch.save(task.adapter.state(), folder / f"{processes}_{rank}.pt")


@pytest.mark.slow
def test_two_processes_keep_one_state_and_its_metrics(tmp_path: Path) -> None:
    spawn(one_process, 2, tmp_path)
    for name in CASES:
        for metrics in recorded_metrics(tmp_path / name):
            for metric, value in of_the_saved(tmp_path / name / "adapter").items():
                assert metrics[metric] == pytest.approx(value, abs=1e-5), name
    spawn(one_process, 1, tmp_path)
    alone, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1_0.pt", "2_0.pt", "2_1.pt"))
    for key, value in alone.items():  # what was unfrozen too, of which DDP knows nothing
        assert torch.equal(first[key], second[key]), key
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-6)
