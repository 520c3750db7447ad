"""A training that goes wrong ends before the step, with the rows, the place and the cause; nothing bad is kept."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from models import make
from peftlight import Adapter, PEFTStrategy
from peftlight.callbacks import Guard, Quantize
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.strategies import Full, LoRA
from peftlight.tasks import CausalLM, PEFTModule, SequenceClassification, base
from processes.worlds import spawn
from tasks.small import (
    QUIET,
    Batch,
    batches,
    class_rows,
    constant,
    loader,
    padded,
    quiet_trainer,
    stirred,
    token_rows,
    trained,
)

pytestmark = QUIET

POISON = 77
"""A token whose embedding is so large that the layer normalisation after it overflows."""
ROWS = class_rows([5, 7, 4, 6, 5, 7, 4, 6, 5, 7, 4, 6], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2])
for row in ROWS:
    row["input_ids"][row["input_ids"] == POISON] = 2


def poisoned(number: int) -> list[dict[str, Any]]:
    """The rows, with the token in one of them."""
    rows = [dict(row) for row in ROWS]
    rows[number]["input_ids"] = rows[number]["input_ids"].clone()
    rows[number]["input_ids"][2] = POISON
    return rows


def classifier(strategy: PEFTStrategy | None = None, **options: Any) -> SequenceClassification:
    model = make("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[POISON] = 3e38
    settings = {"optimizer": partial(torch.optim.AdamW, lr=0.01), "lr_scheduler": constant, **options}
    return SequenceClassification(model, strategy or LoRA(rank=2), num_labels=3, **settings)


def stopped(module: PEFTModule, made: list[Batch], folder: Path, *callbacks: Any, **options: Any) -> str:
    """The message with which the training ends; it fits on a screen."""
    torch.manual_seed(5)
    with pytest.raises(UserError) as caught:
        quiet_trainer(folder, callbacks, **options).fit(module, loader(made))
    text = str(caught.value)
    assert len(text.splitlines()) <= 25
    return text


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_loss_that_is_not_finite_names_step_batch_rows_and_the_first_module(micro_batch: int, tmp_path: Path) -> None:
    made = batches(poisoned(9), 2)
    made = made if micro_batch == 1 else [*made[:4], made[5], made[4]]
    text = stopped(classifier(), made, tmp_path, accumulate_grad_batches=2)
    assert "Training was stopped before step 3: the loss is not finite (nan)." in text
    assert "The weights are those after step 2." in text
    assert f"Process 0, micro-batch {micro_batch} of 2, loss nan:" in text
    assert "row 8: 5 tokens, 1 label\n  row 9: 7 tokens, 1 label" in text
    assert "came out of bert.embeddings.LayerNorm, in float32" in text
    assert re.search(r"the largest before it was 3e\+38, from bert.embeddings.word_embeddings", text)
    assert re.search(r"losses [\d.]+, [\d.]+, nan; largest gradients [\d.]+, [\d.]+, nan; learning rate 0.01", text)


def test_weights_and_optimizer_are_those_after_the_last_good_step(tmp_path: Path) -> None:
    bad, good = classifier(), classifier()
    stopped(bad, batches(poisoned(9), 2), tmp_path)
    torch.manual_seed(5)
    trainer = quiet_trainer(tmp_path, max_steps=4)
    trainer.fit(good, loader(batches(ROWS, 2)))
    for name, value in trained(good.model).items():
        assert torch.equal(trained(bad.model)[name], value), name
    ours, theirs = (m.trainer.optimizers[0].state_dict()["state"] for m in (bad, good))
    assert ours.keys() == theirs.keys()
    for key, state in theirs.items():
        assert all(torch.equal(ours[key][name], value) for name, value in state.items())


def test_the_stored_batch_gives_the_same_again(tmp_path: Path) -> None:
    module, made = classifier(), batches(poisoned(9), 2)
    text = stopped(module, made, tmp_path)
    file = tmp_path / "failed_batch.safetensors"
    assert f"The batch is kept in {file}" in text
    stored = load_file(file)
    assert all(torch.equal(stored[key], made[4][key]) for key in made[4])
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["failed"])
    assert (facts["step"], facts["micro_batch"], facts["failure"]) == (5, 1, "loss")
    torch.set_rng_state(stored["random_state"])
    module.model.train()
    assert module.loss(stored)[0].isnan()


class Taking(SequenceClassification):
    """Takes the labels out of its batch, as losses written for other trainers do, and is NaN."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        labels = batch.pop("labels")
        return torch.nn.functional.cross_entropy(self.logits(batch), labels) * torch.nan, (labels >= 0).sum()


def test_a_loss_that_changes_its_batch_is_computed_once_more_and_the_batch_kept_whole(tmp_path: Path) -> None:
    made = batches(ROWS, 2)
    text = stopped(Taking(make("bert"), LoRA(rank=2), num_labels=3), made, tmp_path)
    assert "loss nan:\n  row 0: 5 tokens, 1 label\n" in text
    assert torch.equal(load_file(tmp_path / "failed_batch.safetensors")["labels"], torch.tensor([0, 1]))


def test_the_random_state_stored_is_that_of_the_step(tmp_path: Path) -> None:
    """With dropout, the same loss comes out again, and what was drawn while looking for the cause is put back."""
    module, losses = Silent(make("bert"), LoRA(rank=2, dropout=0.5), num_labels=3), []
    module.strategy.dropout = 0.5
    plain = module.loss

    def noted(batch: Any) -> tuple[Tensor, Tensor]:
        loss, labels = SequenceClassification.loss(module, batch)
        losses.append(float(loss.detach()))
        return plain(batch)[0] + 0 * loss, labels

    module.loss = noted  # type: ignore[method-assign]
    module.configure_model()
    stirred(module.adapter)
    stopped(module, batches(ROWS, 2), tmp_path, Guard(idle_steps=3))
    assert len(losses) == 4
    assert losses[3] == losses[2]
    assert len(set(losses[:3])) == 3


def test_no_checkpoint_of_the_failed_step_is_written(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_last=True, filename="{step}", save_top_k=-1)
    stopped(classifier(), batches(poisoned(9), 2), tmp_path, saving, enable_checkpointing=True)
    assert sorted(path.stem for path in (tmp_path / "kept").iterdir()) == [
        "last", "step=1", "step=2", "step=3", "step=4"
    ]  # fmt: skip
    kept = torch.load(tmp_path / "kept" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 4
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


def test_a_base_that_is_not_finite_is_named(tmp_path: Path) -> None:
    module = classifier()
    with torch.no_grad():
        module.model.bert.encoder.layer[1].output.dense.bias[3] = torch.inf
    text = stopped(module, batches(ROWS, 2), tmp_path)
    assert "came out of bert.encoder.layer.1.output.dense" in text
    assert "The base itself is not finite in bert.encoder.layer.1.output.dense.bias" in text


def test_a_trained_tensor_that_is_not_finite_is_named_before_the_first_step(tmp_path: Path) -> None:
    """Though no row meets it, no checkpoint could be saved."""
    module = classifier(Full())
    with torch.no_grad():
        module.model.bert.embeddings.word_embeddings.weight[POISON] = torch.nan
    text = stopped(module, batches(ROWS, 2), tmp_path)
    assert "1 of the tensors to be trained hold values that are not finite" in text
    assert "bert.embeddings.word_embeddings.weight. The base's file is damaged" in text
    assert module.trainer.global_step == 0


def test_a_base_that_was_damaged_before_it_was_quantized_is_among_the_causes(tmp_path: Path) -> None:
    module = classifier(trained_modules=["classifier"])
    with torch.no_grad():
        module.model.bert.encoder.layer[0].attention.self.query.weight[0, 5] = torch.nan
    text = stopped(module, MANY, tmp_path, Quantize(block_size=32))
    assert "Numbers of the base that are not finite, which its few bits hide" in text


def test_a_learning_rate_that_is_far_too_high_is_named(tmp_path: Path) -> None:
    module = classifier(optimizer=partial(torch.optim.SGD, lr=1e30))
    text = stopped(module, batches(ROWS, 2), tmp_path)
    assert "lower the learning rate (--optimizer.lr)" in text
    assert "--trainer.gradient_clip_val 1.0" in text
    assert re.search(r"running away \(trained weights are as large as \d.*e\+\d\d\).* learning rate is 1e\+30", text)


def test_weights_held_in_float16_are_not_told_to_learn_more_slowly(tmp_path: Path) -> None:
    """In it Adam's eps is 0, so where a gradient is 0 a step is 0 / 0, at any learning rate."""
    module = SequenceClassification(make("bert"), LoRA(rank=2), num_labels=3, lr_scheduler=constant)
    text = stopped(module, batches(ROWS, 2), tmp_path, precision="16-true")
    assert "before step 2: the loss is not finite" in text
    assert "float16 holds nothing above 65504, nor Adam's eps of 1e-8" in text


def test_a_clipped_training_is_not_told_to_clip(tmp_path: Path) -> None:
    text = stopped(classifier(), batches(poisoned(9), 2), tmp_path, gradient_clip_val=0.5)
    assert "Nothing ran away before, so it is this batch on this base" in text
    assert "lower the learning rate" in text
    assert "gradient_clip_val" not in text


class RootDelta(Delta):
    """base(x) + (w²)^½, whose slope at w = 0 is infinite."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(width))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) + self.w.square().sqrt()


@dataclass
class Root(PEFTStrategy):
    """The delta above on one layer."""

    def deltas(self, model: nn.Module) -> Iterable[tuple[str, Delta]]:
        yield "bert.encoder.layer.0.output.dense", RootDelta(model.config.hidden_size)


def test_a_gradient_that_is_not_finite_names_its_tensor(tmp_path: Path) -> None:
    text = stopped(classifier(Root(), trained_modules=[]), batches(ROWS, 2), tmp_path, accumulate_grad_batches=3)
    assert "before step 1: the gradient is not finite, though the loss is (1." in text
    assert "micro-batch 1 of 3" in text
    assert "The gradient is not finite in 1 of 1 trained tensors" in text
    assert "nearest to the loss is bert.encoder.layer.0.output.dense.deltas.default.w" in text
    assert "a square root or a norm at 0" in text


@dataclass
class RootPenalty(LoRA):
    """LoRA with a penalty whose value is 0 and whose slope is infinite."""

    def penalty(self, adapter: Adapter) -> Tensor:
        return (
            torch.stack([p.square().sum() for name, p in adapter.parameters().items() if name.endswith("B")])
            .sum()
            .sqrt()
        )


def test_a_penalty_that_is_not_finite_is_told_from_the_loss(tmp_path: Path) -> None:
    text = stopped(classifier(RootPenalty(rank=2)), batches(ROWS, 2), tmp_path)
    assert "before step 1: the gradient of the strategy's penalty is not finite." in text
    assert "row" not in text
    assert not (tmp_path / "failed_batch.safetensors").exists()


class Scripted(SequenceClassification):
    """Its losses are those of a list, step after step, the last one for ever; their gradient is 0."""

    script: tuple[float, ...] = (0.0,)
    slope = 0.0

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        value = self.script[min(self.trainer.global_step, len(self.script) - 1)]
        return self.logits(batch).sum() * self.slope * value + value * len(batch["labels"]), torch.tensor(2)


class Silent(Scripted):
    """A loss of 0 from the start."""


def scripted(*losses: float, slope: float = 0.0) -> Scripted:
    module = Scripted(make("bert"), LoRA(rank=2), num_labels=3)
    module.script, module.slope = losses, slope
    return module


MANY = batches(class_rows([4] * 60, [0, 1, 2] * 20), 2)


@pytest.mark.parametrize("losses", [(0.0,), (1.1, 0.9, 0.0)], ids=["from the start", "all at once"])
def test_a_loss_of_exactly_zero_stops_the_run(losses: tuple[float, ...], tmp_path: Path) -> None:
    text = stopped(scripted(*losses, slope=1.0), MANY, tmp_path)
    assert f"before step {10 + losses.index(0.0)}: the loss has been exactly 0 for many steps" in text
    assert "--trainer.precision 32-true" in text
    assert text.count("\n  row ") == 2


def test_a_loss_that_fell_to_zero_is_a_success(tmp_path: Path) -> None:
    module, trainer = scripted(1.0, 0.1, 1e-3, 1e-6, 0.0, slope=1.0), quiet_trainer(tmp_path)
    with pytest.warns(UserWarning, match="exactly 0 for 10 steps: these rows are learned by heart"):
        trainer.fit(module, loader(MANY))
    assert trainer.global_step == 30


def test_a_loss_that_was_small_before_a_row_that_is_not_known_may_be_zero_again(tmp_path: Path) -> None:
    """As with batches of one row, where each is either known or not."""
    module, trainer = scripted(1.0, 0.3, 0.01, 0.0, 0.9, 0.0, slope=1.0), quiet_trainer(tmp_path)
    with pytest.warns(UserWarning, match="exactly 0 for 10 steps: these rows are learned by heart"):
        trainer.fit(module, loader(MANY))
    assert trainer.global_step == 30


def test_no_gradient_at_all_stops_the_run(tmp_path: Path) -> None:
    text = stopped(scripted(0.7), MANY, tmp_path, Guard(idle_steps=4))
    assert (
        "before step 4: the gradient has been exactly 0 in all trained tensors for many steps, at a loss of 0.7" in text
    )


def test_a_loss_that_grows_stops_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    trainer.fit(scripted(1.0, 10.0, 1e3, 1e6, 1e9, 1e12, slope=1e-3), loader(MANY))
    assert trainer.global_step == 30


def test_rows_without_labels_are_said_at_once_and_stop_the_run_if_they_go_on(tmp_path: Path) -> None:
    rows = token_rows([4] * 60, masked=4)
    for row in rows[:4]:
        row["labels"] = row["input_ids"].clone()
    with pytest.warns(UserWarning, match=r"Step 3 has no label in any of its rows \(4, 5\)"):
        text = stopped(CausalLM(make("llama"), LoRA(rank=2)), batches(rows, 2), tmp_path)
    assert "before step 12: no row of the last steps had a label" in text
    assert "row 22: 4 tokens, 0 labels" in text
    assert "--data.max_length" in text


def test_one_step_without_labels_among_others_goes_on(tmp_path: Path) -> None:
    rows = [dict(row) for row in ROWS]
    rows[6]["labels"] = rows[7]["labels"] = -1
    trainer = quiet_trainer(tmp_path)
    with pytest.warns(UserWarning, match=r"Step 4 has no label"):
        trainer.fit(classifier(), loader(batches(rows, 2)))
    assert trainer.global_step == 6


def test_a_validation_loss_that_is_not_finite_is_said_and_stops_nothing(tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path)
    with pytest.warns(UserWarning, match="The validation loss is nan after step 6"):
        trainer.fit(classifier(), loader(batches(ROWS, 2)), loader(batches(poisoned(9), 2)))
    assert trainer.global_step == 6


def test_no_checkpoint_holds_weights_that_are_not_finite(tmp_path: Path) -> None:
    module, trainer = classifier(optimizer=partial(torch.optim.SGD, lr=1e38)), quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(module, loader(batches(ROWS, 2)))
    with torch.no_grad():
        next(iter(trained(module.model).values())).view(-1)[0] = torch.nan
    with pytest.raises(UserError, match=r"after step 1: 1 trained tensors .*query.deltas.default.A"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()


def test_no_checkpoint_holds_an_optimizer_that_would_train_nothing_any_more(tmp_path: Path) -> None:
    """The square of a gradient of 1e25 is infinite, and Adam divides by it from then on."""
    module, saving = scripted(1e25, 1.0, slope=1.0), ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2)
    text = stopped(module, MANY, tmp_path, saving, enable_checkpointing=True)
    assert "No checkpoint is saved after step 2: the optimizer keeps values that are not finite" in text
    assert "as their exp_avg_sq, so it would not train them any more" in text
    assert not list((tmp_path / "kept").glob("*"))


def test_a_guard_of_ones_own_takes_the_place_of_ours(tmp_path: Path) -> None:
    own, module = Guard(idle_steps=3), scripted(0.0)
    assert "before step 3" in stopped(module, MANY, tmp_path, own)
    assert [callback for callback in module.trainer.callbacks if isinstance(callback, Guard)] == [own]


def test_a_second_training_starts_to_count_afresh(tmp_path: Path) -> None:
    module = scripted(*[0.0] * 6, slope=1.0)
    for _ in range(2):
        quiet_trainer(tmp_path, max_steps=6).fit(module, loader(MANY))
    assert [callback for callback in module.trainer.callbacks if isinstance(callback, Guard)] == [module.guard]


@pytest.mark.parametrize("wrong", [{"skipped_steps": 0}, {"idle_steps": -1}])
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="is at least 1; got"):
        Guard(**wrong)


def test_a_resumed_training_still_knows_that_the_loss_fell(tmp_path: Path) -> None:
    losses = (1.0, 1e-3, *[0.0] * 9)
    first, file = quiet_trainer(tmp_path, max_steps=5), tmp_path / "at5.ckpt"
    first.fit(scripted(*losses, slope=1.0), loader(MANY[:5]))
    first.save_checkpoint(file)
    again = quiet_trainer(tmp_path, max_steps=12, max_epochs=4)
    with pytest.warns(UserWarning, match="learned by heart"):
        again.fit(scripted(*losses, slope=1.0), loader(MANY[:5]), ckpt_path=file, weights_only=True)
    assert again.global_step == 12


def one_of_two(rank: int, processes: int, folder: Path, strategy: str) -> None:
    """What one of two processes does: only the second meets the token."""
    base.keep_watch = lambda trainer: None  # which would end the slower process by the other's error
    trainer = quiet_trainer(folder, devices=processes, strategy=strategy, use_distributed_sampler=False)
    rows = poisoned(9) if rank == 1 else ROWS
    try:
        trainer.fit(classifier(), loader([padded(rows[start : start + 2]) for start in range(0, 12, 2)]))
    except UserError as error:
        (folder / f"{rank}.txt").write_text(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_all_processes_stop_at_once_and_name_the_one_that_it_came_from(strategy: str, tmp_path: Path) -> None:
    spawn(one_of_two, 2, tmp_path, strategy)
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in range(2))
    assert first == second
    assert "before step 5" in first
    assert "Process 1, micro-batch 1 of 1, loss nan:\n  row 8: 5 tokens, 1 label\n  row 9" in first
    assert "came out of bert.embeddings.LayerNorm" in first
    assert torch.equal(load_file(tmp_path / "failed_batch.safetensors")["row"], torch.tensor([8, 9]))
