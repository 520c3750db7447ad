"""The gradient of a step is that of (sum of all label losses) / (number of labels), however the rows are batched."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import make
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM, PEFTModule, SequenceClassification
from processes.worlds import spawn
from tasks.small import (
    QUIET,
    Row,
    Watch,
    assert_equal_states,
    batches,
    class_rows,
    constant,
    loader,
    quiet_trainer,
    standing_still,
    stirred,
    token_rows,
    trained,
)

pytestmark = QUIET

TOKENS = token_rows([5, 60, 3, 40, 17, 2, 33, 9], masked=2)
CLASSES = class_rows([5, 39, 3, 40, 17, 2, 33, 9], [0, 2, -1, 1, 1, -1, 0, 2])


def causal() -> PEFTModule:
    module = CausalLM(make("llama"), LoRA(rank=2), optimizer=standing_still, lr_scheduler=constant)
    return ready(module)


def classifier() -> PEFTModule:
    module = SequenceClassification(make("bert"), LoRA(rank=2), optimizer=standing_still, lr_scheduler=constant)
    return ready(module)


def ready(module: PEFTModule) -> PEFTModule:
    module.configure_model()
    assert module.adapter is not None
    stirred(module.adapter)
    return module


def by_hand(module: PEFTModule, rows: list[Row]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradient of the rows, each alone and so without padding, in plain torch."""
    assert module.model is not None
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = module.model(input_ids=row["input_ids"][None]).logits[0]
        labels = torch.as_tensor(row["labels"])
        targets = labels[None] if labels.dim() == 0 else labels[1:]
        scores = logits[None] if labels.dim() == 0 else logits[:-1]
        for score, target in zip(scores, targets, strict=True):
            if target >= 0:
                total = total - F.log_softmax(score, -1)[target]
                count += 1
    mean = total / count
    parameters = trained(module.model)
    gradients = torch.autograd.grad(mean, list(parameters.values()))
    return mean.item(), dict(zip(parameters, gradients, strict=True))


@pytest.mark.parametrize(("make_module", "rows"), [(causal, TOKENS), (classifier, CLASSES)])
@pytest.mark.parametrize(("size", "accumulate"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_every_split_of_a_step_into_batches_gives_the_gradient_per_label(
    make_module, rows: list[Row], size: int, accumulate: int, tmp_path: Path
) -> None:
    module, watch = make_module(), Watch()
    loss, gradient = by_hand(module, rows)
    quiet_trainer(tmp_path, [watch], accumulate_grad_batches=accumulate).fit(module, loader(batches(rows, size)))
    assert len(watch.gradients) == 1
    assert_equal_states(watch.gradients[0], gradient, rtol=1e-5, atol=1e-6)
    assert watch.logged[0]["train_loss"] == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(("make_module", "rows"), [(causal, TOKENS), (classifier, CLASSES)])
def test_the_last_incomplete_step_of_an_epoch_is_a_mean_over_its_own_labels(
    make_module, rows: list[Row], tmp_path: Path
) -> None:
    module, watch = make_module(), Watch()
    trainer = quiet_trainer(tmp_path, [watch], accumulate_grad_batches=3, max_epochs=2)
    trainer.fit(module, loader(batches(rows[:7], 2)))
    steps = [by_hand(module, rows[:6]), by_hand(module, rows[6:7])] * 2
    assert len(watch.gradients) == 4
    for gradients, logged, (loss, expected) in zip(watch.gradients, watch.logged, steps, strict=True):
        assert_equal_states(gradients, expected, rtol=1e-5, atol=1e-6)
        assert logged["train_loss"] == pytest.approx(loss, abs=1e-5)


def test_labels_that_are_unknown_do_not_change_the_gradient(tmp_path: Path) -> None:
    known = [row for row in CLASSES if row["labels"] >= 0]
    seen = []
    for rows in (CLASSES, known):
        module, watch = classifier(), Watch()
        quiet_trainer(tmp_path, [watch]).fit(module, loader(batches(rows, 8)))
        seen.append(watch.gradients[0])
    assert_equal_states(seen[0], seen[1], rtol=1e-5, atol=1e-6)


def test_a_step_without_any_label_has_no_gradient_and_no_loss(tmp_path: Path) -> None:
    rows = class_rows([4, 6], [-1, -1])
    module, watch = classifier(), Watch()
    with pytest.warns(UserWarning, match="Step 1 has no label in any of its rows"):
        quiet_trainer(tmp_path, [watch]).fit(module, loader(batches(rows, 2)))
    assert watch.logged[0]["train_loss"] == 0
    assert all(not gradient.any() for gradient in watch.gradients[0].values())


def test_a_first_batch_without_labels_leaves_the_step_right(tmp_path: Path) -> None:
    rows = class_rows([4, 6, 9, 3], [-1, -1, 1, 2])
    module, watch = classifier(), Watch()
    _, expected = by_hand(module, rows)
    quiet_trainer(tmp_path, [watch], accumulate_grad_batches=2).fit(module, loader(batches(rows, 2)))
    assert_equal_states(watch.gradients[0], expected, rtol=1e-5, atol=1e-6)


class OfItsOwn(SequenceClassification):
    """Differentiates the mean of each micro-batch, as Lightning's modules do."""

    def training_step(self, batch, batch_idx: int) -> Tensor:
        loss_sum, labels = self.loss(batch)
        return loss_sum / labels


def test_a_training_step_that_leaves_the_labels_out_is_refused(tmp_path: Path) -> None:
    module = OfItsOwn(make("bert"), LoRA(rank=2), num_labels=3)
    with pytest.raises(UserError, match=r"OfItsOwn.training_step differentiates a loss of its own.*define `loss`"):
        quiet_trainer(tmp_path).fit(module, loader(batches(CLASSES, 4)))


class LeavingOut(SequenceClassification):
    """Takes no step with the second batch, as Lightning allows."""

    def training_step(self, batch, batch_idx: int) -> Tensor | None:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


def test_a_batch_that_a_training_step_leaves_out_has_no_loss(tmp_path: Path) -> None:
    module, watch = LeavingOut(make("bert"), LoRA(rank=2), num_labels=3), Watch()
    with pytest.warns(UserWarning, match=r".") as told:  # Lightning remarks on it, too
        quiet_trainer(tmp_path, [watch]).fit(module, loader(batches(CLASSES, 2)))
    assert any("Step 2 has no label" in str(one.message) for one in told)
    losses = [logged["train_loss"] for logged in watch.logged]
    assert losses[1] == 0
    assert min(losses[0], *losses[2:]) > 0


def test_a_fit_after_one_that_was_broken_off_within_a_step_starts_afresh(tmp_path: Path) -> None:
    module, watch = causal(), Watch()
    broken = [*batches(TOKENS[:2], 1), {"input_ids": torch.zeros(1, 4, dtype=torch.long)}]
    with pytest.raises(UserError, match="labels"):
        quiet_trainer(tmp_path, accumulate_grad_batches=4).fit(module, loader(broken))
    _, expected = by_hand(module, TOKENS)
    quiet_trainer(tmp_path, [watch], accumulate_grad_batches=4).fit(module, loader(batches(TOKENS, 2)))
    assert_equal_states(watch.gradients[0], expected, rtol=1e-5, atol=1e-6)


def one_of_two(rank: int, processes: int, folder: Path) -> None:
    """What one of two processes does with its share of two micro-batches; the second has no label in its first one."""
    module, watch = classifier(), Watch()
    options = {"devices": processes, "strategy": "ddp", "use_distributed_sampler": False, "accumulate_grad_batches": 2}
    quiet_trainer(folder, [watch], **options).fit(module, loader(batches(SHARES[rank], 2)))
    torch.save((watch.gradients[0], watch.logged[0]["train_loss"]), folder / f"{rank}.pt")


SHARES = [class_rows([5, 39, 3, 40], [0, 2, 1, 1], seed=5), class_rows([17, 2, 33, 9], [-1, -1, 0, -1], seed=6)]


@pytest.mark.slow
def test_processes_with_few_labels_or_none_count_by_their_labels(tmp_path: Path) -> None:
    spawn(one_of_two, 2, tmp_path)
    loss, expected = by_hand(classifier(), SHARES[0] + SHARES[1])
    for rank in range(2):
        gradient, logged = torch.load(tmp_path / f"{rank}.pt")
        assert_equal_states(gradient, expected, rtol=1e-5, atol=1e-6)
        assert logged == pytest.approx(loss, abs=1e-5)
