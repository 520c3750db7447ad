"""Under mixed precision what trains stays in float32; the gradient scaler's skipped steps harm nothing."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from models import make
from peftlight import Adapter, PEFTStrategy
from peftlight.callbacks import Guard
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA, LoRA
from peftlight.tasks import SequenceClassification, precision
from recipes import RECIPES
from tasks.small import (
    QUIET,
    Watch,
    batches,
    class_rows,
    constant,
    loader,
    quiet_trainer,
    standing_still,
    stirred,
    trained,
)

pytestmark = QUIET

ROWS = class_rows([5, 9, 4, 12, 7, 6, 8, 5], [0, 1, 2, 1, 0, 2, 1, 0])
NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="Lightning's 16-mixed is for CUDA; there is none")
TOO_LARGE = 2.0**32
"""A scale with which the gradients of the tiny model overflow, some times halved too."""


def scaled(scale: float = 2.0**16) -> dict[str, Any]:
    """What makes a Trainer compute in float16 with a scaler on the CPU, which Lightning does on CUDA alone."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))]}


ADAMW = partial(torch.optim.AdamW, lr=0.01)


def module_with(
    strategy: PEFTStrategy, half: torch.dtype | None = None, optimizer: Any = ADAMW
) -> SequenceClassification:
    model = make("bert").to(half or torch.float32)
    return SequenceClassification(
        model, strategy, trained_modules=["classifier"], num_labels=3, optimizer=optimizer, lr_scheduler=constant
    )


def fitted(module: SequenceClassification, folder: Path, *callbacks: Any, size: int = 4, **options: Any) -> Watch:
    torch.manual_seed(3)
    watch = Watch()
    quiet_trainer(folder, [watch, *callbacks], **options).fit(module, loader(batches(ROWS, size)))
    return watch


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", RECIPES)
def test_what_trains_is_float32_with_its_gradient_and_optimizer(name: str, half: torch.dtype, tmp_path: Path) -> None:
    module = module_with(RECIPES[name](), half)
    options = scaled() if half == torch.float16 else {"precision": "bf16-mixed"}
    watch = fitted(module, tmp_path, max_epochs=10, **options)
    own = module.adapter.parameters()
    state = [v for held in module.trainer.optimizers[0].state.values() for v in held.values() if isinstance(v, Tensor)]
    assert len(state) >= 2 * len(own)
    for tensors in (own.values(), watch.gradients[0].values(), state):
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
    frozen = [p for name, p in module.model.named_parameters() if name not in own and p.dim() == 2]
    assert {p.dtype for p in frozen} <= {half}
    losses = [logged["train_loss"] for logged in watch.logged]
    assert sum(losses[-4:]) < sum(losses[:4])


@NEEDS_CUDA
def test_sixteen_mixed_on_cuda_trains_as_float32_does(tmp_path: Path) -> None:
    ours, exact = (
        fitted(module_with(LoRA(rank=2)), tmp_path, accelerator="gpu", precision=precision, max_epochs=4)
        for precision in ("16-mixed", "32-true")
    )
    for one, other in zip(ours.logged, exact.logged, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=2e-2)


def test_the_scale_leaves_gradients_clipping_and_steps_as_they_are(tmp_path: Path) -> None:
    """Micro-batches of unequal rows, clipped: the same as without a scaler, to the precision of float16."""
    settings = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05, "max_epochs": 6}
    ours, exact = (fitted(module_with(LoRA(rank=2)), tmp_path, **settings, **options) for options in (scaled(), {}))
    for one, other in zip(ours.gradients, exact.gradients, strict=True):
        assert sum(g.square().sum() for g in one.values()).sqrt() == pytest.approx(0.05, rel=1e-4)
        for name, gradient in other.items():
            torch.testing.assert_close(one[name], gradient, rtol=0.05, atol=1e-3)
    for one, other in zip(ours.logged, exact.logged, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=5e-3)


def test_skipped_steps_move_nothing_until_a_scale_fits(tmp_path: Path) -> None:
    module, other = module_with(LoRA(rank=2)), module_with(LoRA(rank=2))
    for each in (module, other):
        torch.manual_seed(1)
        each.configure_model()
    start = {name: p.detach().clone() for name, p in trained(module.model).items()}
    late = fitted(module, tmp_path, size=8, max_epochs=20, **scaled(TOO_LARGE)).parameters
    skipped = [any(not torch.equal(after[name], start[name]) for name in start) for after in late].index(True)
    assert 5 < skipped < 18
    fitting = TOO_LARGE / 2**skipped
    assert module.trainer.precision_plugin.scaler.get_scale() == fitting
    at_once = fitted(other, tmp_path, size=8, max_epochs=20 - skipped, **scaled(fitting)).parameters
    for one, another in zip(late[skipped:], at_once, strict=True):
        assert all(torch.equal(one[name], value) for name, value in another.items())


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        fitted(module_with(LoRA(rank=2)), tmp_path, Guard(skipped_steps=4), max_epochs=12, **scaled(TOO_LARGE))
    assert "before step 4: the gradient has not been finite for many steps, whatever its scale" in str(caught.value)
    assert "float16 holds nothing above 65504" in str(caught.value)


def test_skipped_steps_between_others_stop_nothing(tmp_path: Path) -> None:
    module = module_with(LoRA(rank=2))
    fitted(module, tmp_path, Guard(skipped_steps=20), max_epochs=12, **scaled(TOO_LARGE))
    assert module.trainer.global_step == 24


def test_a_loss_that_overflows_in_float16_stops_at_once(tmp_path: Path) -> None:
    """No scale helps against numbers that leave the range in the forward pass."""
    module = module_with(LoRA(rank=2))
    with torch.no_grad():
        module.model.bert.encoder.layer[0].intermediate.dense.weight.mul_(1e7)
    with pytest.raises(UserError) as caught:
        fitted(module, tmp_path, **scaled())
    assert "before step 1: the loss is not finite" in str(caught.value)
    assert "came out of bert.encoder.layer.0.intermediate.dense, in float16" in str(caught.value)
    assert "float16 holds nothing above 65504" in str(caught.value)
    assert "--trainer.precision bf16-mixed" in str(caught.value)


class Pulled(LoRA):
    """LoRA with half the square of its weights as a penalty, whose gradient is the weights."""

    def penalty(self, adapter: Adapter) -> Tensor:
        return 0.5 * torch.stack([p.square().sum() for p in adapter.parameters().values()]).sum()


@pytest.mark.parametrize("scale", [2.0**4, 2.0**16])
def test_the_penalty_is_not_scaled(scale: float, tmp_path: Path) -> None:
    seen = []
    for strategy in (Pulled(rank=2), LoRA(rank=2)):
        module = module_with(strategy, optimizer=standing_still)
        module.configure_model()
        stirred(module.adapter)
        seen.append(fitted(module, tmp_path, **scaled(scale)).gradients[0])
    weights = trained(module.model)
    for name, gradient in seen[0].items():
        torch.testing.assert_close(gradient - seen[1][name], weights[name], rtol=1e-5, atol=1e-6)


def test_adalora_keeps_its_budget_although_steps_were_skipped(tmp_path: Path) -> None:
    strategy = AdaLoRA(init_r=6, target_r=2, initial_phase=4, final_phase=6, target_modules="attention")
    module = module_with(strategy)
    fitted(module, tmp_path, max_epochs=15, **scaled(TOO_LARGE))
    assert module.trainer.precision_plugin.scaler.get_scale() < TOO_LARGE
    sites = module.adapter.sites.values()
    assert sum(int(delta.mask.sum()) for delta in sites) == 2 * len(sites)
    assert all(value.isfinite().all() for value in module.adapter.state().values())


@pytest.mark.parametrize(("times", "told"), [(14.0, True), (0.4, False)])
@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_where_the_cpu_takes_longer_in_16_bits_it_is_said_before_the_first_step(
    times: float, told: bool, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(precision, "rank_zero_info", said.append)
    monkeypatch.setattr(precision, "seconds_of_product", lambda dtype: times if dtype == torch.bfloat16 else 1.0)
    trainer = quiet_trainer(tmp_path, precision="bf16-mixed")
    getattr(trainer, stage)(module_with(LoRA(rank=2)), loader(batches(ROWS, 4)))
    assert len(said) == told
    assert not told or ("14 times as long" in said[0] and "--trainer.precision 32-true" in said[0])


def test_how_long_a_product_takes_is_measured() -> None:
    assert 0 < precision.seconds_of_product(torch.float32) < 10


def test_32_bits_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(precision, "seconds_of_product")
    quiet_trainer(tmp_path).fit(module_with(LoRA(rank=2)), loader(batches(ROWS, 4)))
