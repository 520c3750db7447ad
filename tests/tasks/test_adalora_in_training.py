"""AdaLoRA under the Trainer: it drives its own schedule, resumes to the same ranks, and its file holds the budget."""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from models import inputs_for, make
from peftlight import attach, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA
from peftlight.tasks import SequenceClassification
from processes.worlds import spawn
from tasks.small import QUIET, batches, class_rows, loader, padded, quiet_trainer

pytestmark = QUIET

ROWS = class_rows([5, 39, 3, 40, 17, 2, 33, 9] * 5, [0, 2, 1, 1, 1, 0, 0, 2] * 5)
LAYERS = 12  # six linear layers in each of two blocks


def adalora(**fields: Any) -> AdaLoRA:
    settings = {"init_r": 6, "target_r": 2, "initial_phase": 0.1, "final_phase": 0.3, "target_modules": "attention+mlp"}
    return AdaLoRA(**{**settings, **fields})


def module_with(strategy: AdaLoRA) -> SequenceClassification:
    return SequenceClassification(
        make("bert"), strategy, trained_modules=["classifier"],
        optimizer=partial(torch.optim.AdamW, lr=0.01),
    )  # fmt: skip


def fitted(strategy: AdaLoRA, folder: Path, callbacks: Any = (), size: int = 2, **options: Any) -> Any:
    """The module after a training of the 40 rows in their order, and its Trainer."""
    torch.manual_seed(3)
    module, path = module_with(strategy), options.pop("ckpt_path", None)
    trainer = quiet_trainer(folder, callbacks, **options)
    trainer.fit(module, loader(batches(ROWS, size)), ckpt_path=path)
    return module, trainer


def masks(module: Any) -> dict[str, Tensor]:
    return {site: delta.get_buffer("mask") for site, delta in module.adapter.sites.items()}


def budget(step: int, begin: int, end: int) -> int:
    """The schedule of section 3.3, from 6 to 2 singular values for each layer."""
    if step <= begin:
        return 6 * LAYERS
    return 2 * LAYERS if step >= end else int(2 * LAYERS + 4 * LAYERS * (1 - (step - begin) / (end - begin)) ** 3)


@pytest.mark.parametrize(
    ("fields", "begin", "end"),
    [({}, 2, 14), ({"initial_phase": 5, "final_phase": 4}, 5, 16), ({"initial_phase": 0, "final_phase": 0}, 0, 20)],
)
def test_the_ranks_follow_the_cubic_schedule_over_optimizer_steps(
    fields: dict[str, Any], begin: int, end: int, tmp_path: Path
) -> None:
    module, trainer = fitted(
        adalora(**fields), tmp_path, accumulate_grad_batches=2, max_epochs=2, logger=CSVLogger(tmp_path)
    )
    rows = logged(trainer)
    assert [row["rank/total"] for row in rows] == [budget(step, begin, end) for step in range(1, 21)]
    for row in rows:
        ranks = [value for name, value in row.items() if name.startswith("rank/bert")]
        assert len(ranks) == LAYERS
        assert sum(ranks) == row["rank/total"]
    assert {f"rank/{site}": int(mask.sum()) for site, mask in masks(module).items()} == {
        name: value for name, value in rows[-1].items() if name.startswith("rank/bert")
    }


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """What the logger wrote for each step."""
    file = Path(str(trainer.logger.log_dir)) / "metrics.csv"  # type: ignore[union-attr]
    with open(file, newline="") as lines:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]


def test_between_allocations_the_ranks_stay(tmp_path: Path) -> None:
    _, trainer = fitted(adalora(interval=5), tmp_path, logger=CSVLogger(tmp_path))
    totals = [row["rank/total"] for row in logged(trainer)]
    assert totals == [72] * 4 + [budget(5, 2, 14)] * 5 + [budget(10, 2, 14)] * 4 + [24] * 7


def test_the_penalty_is_logged_apart_from_the_loss_of_the_task(tmp_path: Path) -> None:
    first = logged(fitted(adalora(), tmp_path, logger=CSVLogger(tmp_path))[1])[0]
    other = logged(fitted(adalora(orthogonality=0), tmp_path, logger=CSVLogger(tmp_path))[1])[0]
    assert first["train_loss"] == other["train_loss"]
    assert "train_penalty" not in other
    torch.manual_seed(3)
    module = module_with(adalora())
    module.configure_model()
    assert module.adapter is not None
    pairs = [
        (delta.get_parameter("A").detach(), delta.get_parameter("B").detach())
        for delta in module.adapter.sites.values()
    ]
    norms = [(m - torch.eye(6)).norm() for a, b in pairs for m in (a @ a.T, b.T @ b)]
    assert first["train_penalty"] == pytest.approx(0.5 * float(sum(norms)) / len(norms), rel=1e-5)


class StopAfter(Callback):
    """Ends a training after so many epochs of those it planned."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 == self.epochs


@pytest.mark.parametrize(("epochs", "interval"), [(1, 1), (2, 3), (3, 1), (4, 1)])
def test_a_training_that_goes_on_from_a_checkpoint_finds_the_same_ranks(
    epochs: int, interval: int, tmp_path: Path
) -> None:
    plan = {"size": 10, "max_epochs": 5}  # four steps in an epoch
    straight, trainer = fitted(adalora(interval=interval), tmp_path, **plan)
    assert trainer.global_step == 20
    half, first = fitted(adalora(interval=interval), tmp_path, [StopAfter(epochs)], **plan)
    assert first.global_step == 4 * epochs
    assert (sum(int(mask.sum()) for mask in masks(half).values()) > 24) == (epochs < 3)
    first.save_checkpoint(tmp_path / "middle.ckpt")
    resumed, _ = fitted(adalora(interval=interval), tmp_path, ckpt_path=tmp_path / "middle.ckpt", **plan)
    state = resumed.adapter.state()
    for name, value in straight.adapter.state().items():
        assert torch.equal(value, state[name]), name
    assert sum(int(mask.sum()) for mask in masks(resumed).values()) == 24


def test_a_training_resumed_for_fewer_steps_still_ends_at_its_budget(tmp_path: Path) -> None:
    _, first = fitted(adalora(), tmp_path, [StopAfter(3)], size=10, max_epochs=10)
    first.save_checkpoint(tmp_path / "middle.ckpt")  # step 12 of 40; of 16 steps, the last phase begins at 12
    module, _ = fitted(adalora(), tmp_path, ckpt_path=tmp_path / "middle.ckpt", size=10, max_epochs=4)
    assert sum(int(mask.sum()) for mask in masks(module).values()) == 24


def ranks_in(folder: Path) -> list[int]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return [len(value) for key, value in tensors.items() if key.endswith("lora_E")]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_file_holds_exactly_the_budget(precision: str, tmp_path: Path) -> None:
    module, trainer = fitted(adalora(), tmp_path, precision=precision, gradient_clip_val=1.0)
    save_adapter(module.adapter, tmp_path / "adapter")
    assert len(ranks_in(tmp_path / "adapter")) == LAYERS
    assert sum(ranks_in(tmp_path / "adapter")) == 24
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again = SequenceClassification.load_from_checkpoint(tmp_path / "end.ckpt", base_model=make("bert"))
    save_adapter(again.adapter, tmp_path / "again")
    assert ranks_in(tmp_path / "again") == ranks_in(tmp_path / "adapter")


def test_phases_longer_than_the_training_are_refused_before_the_first_step(tmp_path: Path) -> None:
    module, trainer = module_with(adalora(initial_phase=12, final_phase=8)), quiet_trainer(tmp_path)
    with pytest.raises(UserError, match=r"of 20 steps in all.* takes 12 and .* takes 8. They may take 19 together"):
        trainer.fit(module, loader(batches(ROWS, 2)))
    assert trainer.global_step == 0


def one_of_two(rank: int, processes: int, folder: Path) -> None:
    """What one of two processes does: it trains on every other row, and writes its masks."""
    torch.manual_seed(3)
    module, trainer = module_with(adalora()), quiet_trainer(folder, devices=processes, strategy="ddp")
    trainer.fit(module, DataLoader(ROWS, batch_size=2, collate_fn=padded))  # type: ignore[arg-type]
    torch.save(masks(module), folder / f"{rank}.pt")


@pytest.mark.slow
def test_two_processes_find_the_ranks_of_one(tmp_path: Path) -> None:
    spawn(one_of_two, 2, tmp_path)
    single, _ = fitted(adalora(), tmp_path, size=4)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for site, mask in masks(single).items():
        assert torch.equal(both[0][site], mask), site
        assert torch.equal(both[1][site], mask), site
    assert sum(int(mask.sum()) for mask in both[0].values()) == 24


def trained_by_hand(shard: bool) -> tuple[AdaLoRA, Any]:
    """Twenty steps of AdamW with the strategy's hooks, on parameters that are sharded over the processes or not."""
    torch.manual_seed(3)
    strategy, inputs = adalora(), inputs_for("bert")
    adapter = attach(make("bert"), strategy)
    if shard:
        fully_shard(adapter.model)
    optimizer = torch.optim.AdamW([p for p in adapter.model.parameters() if p.requires_grad], lr=0.01)
    for step in range(1, 21):
        optimizer.zero_grad()
        penalty = strategy.penalty(adapter)
        assert penalty is not None
        (adapter.model(**inputs).loss + penalty).backward()
        optimizer.step()
        strategy.after_step(adapter, step, 20)
    return strategy, adapter


def shard_and_train(rank: int, processes: int, folder: Path) -> None:
    store = torch.distributed.FileStore(str(folder / "store"), processes)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    strategy, adapter = trained_by_hand(shard=True)
    assert type(next(iter(adapter.sites.values())).A).__name__ == "DTensor"
    left = {site: delta.A.detach() for site, delta in adapter.finished().sites.items()}
    torch.save({"ranks": strategy.figures(adapter), "A": left}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_parameters_get_the_ranks_of_whole_ones(tmp_path: Path) -> None:
    spawn(shard_and_train, 2, tmp_path)
    strategy, adapter = trained_by_hand(shard=False)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["ranks"] == strategy.figures(adapter)
        for site, delta in adapter.finished().sites.items():
            torch.testing.assert_close(found["A"][site], delta.get_parameter("A").detach())
