"""A callback unfreezes a part of the base in mid-run: it trains by the schedule, is saved, audited, and resumed."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning, EMAWeightAveraging, ModelCheckpoint
from torch.optim import SGD, AdamW, lr_scheduler

from models import make
from peftlight import load_adapter
from peftlight.callbacks import Quantize, RunRecord
from peftlight.errors import UserError
from peftlight.interop import read_record
from peftlight.strategies import LoRA
from peftlight.strategy import PEFTStrategy
from peftlight.tasks import LinearWarmup, PEFTModule, SequenceClassification
from tasks.resuming import ROWS, same, train
from tasks.small import QUIET, Rows, batches, class_rows, constant, loader, padded, quiet_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")]

FEW = class_rows([5, 9, 4, 12], [0, 1, 2, 1])
DENSE = "bert.encoder.layer.1.output.dense"
BENEATH = "bert.encoder.layer.1.attention.self.query"


class Unfreeze(BaseFinetuning):
    """Lightning's own way: a module at the start of an epoch, in a group of its own."""

    def __init__(self, path: str = DENSE, epoch: int = 1, lr: float | None = 1e-2) -> None:
        super().__init__()
        self.path, self.epoch, self.lr = path, epoch, lr

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        pass

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == self.epoch:
            part = pl_module.model.get_submodule(self.path)
            self.unfreeze_and_add_param_group(part, optimizer, lr=self.lr)


class ByHand(Callback):
    """A user's: parameters in the middle of an epoch, added to the optimizer by hand."""

    def __init__(self, step: int = 3, add: bool = True) -> None:
        self.step, self.add = step, add

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        part = [pl_module.model.get_parameter(f"{DENSE}.weight"), pl_module.model.get_parameter(f"{BENEATH}.weight")]
        if trainer.global_step >= self.step and not part[0].requires_grad:
            for parameter in part:
                parameter.requires_grad_(True)
            if self.add:
                trainer.optimizers[0].add_param_group({"params": part, "lr": 1e-2})


class AfterEachEpoch(Callback):
    """A user's: one layer more after each epoch, the last one too; a checkpoint is saved right after."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = pl_module.model.get_parameter(f"bert.encoder.layer.{trainer.current_epoch}.output.dense.weight")
        part.requires_grad_(True)
        trainer.optimizers[0].add_param_group({"params": [part], "lr": 1e-2})


class Rates(Callback):
    """Notes the learning rates of all groups after each step."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def fitted(folder: Path, *callbacks: Callback, strategy: Any = None, **options: Any) -> SequenceClassification:
    settings = {"lr_scheduler": constant, **{key: options.pop(key) for key in ("optimizer", "lr_scheduler", "dtype")
                                             if key in options}}  # fmt: skip
    module = SequenceClassification(make("bert"), strategy or LoRA(rank=2), **settings)
    data = Rows(batches(FEW, 2))
    quiet_trainer(folder, callbacks, **{"max_epochs": 3, **options}).fit(module, data)
    return module


def test_what_is_unfrozen_is_the_adapters_and_is_saved_and_audited(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run", "model: SequenceClassification\n", ["fit"], seed=7)
    module = fitted(tmp_path, record, Unfreeze())
    assert module.verdict is not None
    assert module.verdict.still == []
    assert {f"{DENSE}.weight", f"{DENSE}.bias"} <= {tensor.name for tensor in module.verdict.trained}
    assert all(tensor.had_gradient for tensor in module.verdict.trained)
    assert read_record(tmp_path / "run").trained == ["classifier", DENSE]
    assert_saved(module, tmp_path / "run" / "adapter")
    assert module.adapter is not None
    module.adapter.remove()
    assert torch.equal(module.model.get_parameter(f"{DENSE}.weight"), make("bert").get_parameter(f"{DENSE}.weight"))


@pytest.mark.filterwarnings("ignore:.*It is saved in peftlight's own format")
def test_lightnings_backbone_is_frozen_at_first_and_trains_from_its_epoch_on(tmp_path: Path) -> None:
    record, rates = RunRecord(tmp_path / "run", "model: SequenceClassification\n", ["fit"], seed=7), Rates()
    head_first = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    module = fitted(tmp_path, record, head_first, rates, max_epochs=2)
    assert [len(step) for step in rates.rates] == [1, 1, 2, 2]
    assert rates.rates[2][1] == pytest.approx(1e-3)
    assert module.verdict is not None
    assert {tensor.name for tensor in module.verdict.trained} == {name for name, _ in module.model.named_parameters()}
    assert module.verdict.still == []
    assert_saved(module, tmp_path / "run" / "adapter")


@pytest.mark.filterwarnings("ignore:.*It is saved in peftlight's own format")
def test_what_is_unfrozen_after_an_epochs_last_step_is_in_its_checkpoint_and_no_change_of_the_base(
    tmp_path: Path,
) -> None:
    record = RunRecord(tmp_path / "run", "model: SequenceClassification\n", ["fit"], seed=7)
    saved = ModelCheckpoint(tmp_path / "saved")
    module = fitted(tmp_path, record, AfterEachEpoch(), saved, max_epochs=2, enable_checkpointing=True)
    parts = [f"bert.encoder.layer.{layer}.output.dense.weight" for layer in (0, 1)]
    assert {f"model.{part}" for part in parts} <= torch.load(saved.best_model_path, weights_only=True)[
        "state_dict"
    ].keys()
    assert module.verdict is not None
    assert module.verdict.still == parts[1:]  # no step came after it
    assert_saved(module, tmp_path / "run" / "adapter")


def assert_saved(module: PEFTModule, folder: Path) -> None:
    fresh, batch = make("bert"), padded(FEW)
    load_adapter(fresh, folder)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(fresh.eval()(**inputs).logits, module.model.eval()(**inputs).logits)


@pytest.mark.filterwarnings("ignore:.*It is saved in peftlight's own format")
def test_parameters_beneath_a_delta_are_saved_too(tmp_path: Path) -> None:
    record = RunRecord(tmp_path / "run", "model: SequenceClassification\n", ["fit"], seed=7)
    module = fitted(tmp_path, record, ByHand())
    assert read_record(tmp_path / "run").trained == ["classifier", f"{BENEATH}.weight", f"{DENSE}.weight"]
    assert_saved(module, tmp_path / "run" / "adapter")
    layer = fitted(tmp_path, RunRecord(tmp_path / "whole", "", ["fit"], seed=7), Unfreeze("bert.encoder.layer.1"))
    assert_saved(layer, tmp_path / "whole" / "adapter")


def test_what_the_training_does_to_it_is_what_the_formula_says(tmp_path: Path) -> None:
    """Plain SGD: each tensor moves by the sum of its gradients times its rate."""

    class Gradients(Callback):
        total: Any = 0

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            parameter = pl_module.model.get_parameter(f"{DENSE}.weight")
            rate = [g["lr"] for g in trainer.optimizers[0].param_groups if any(p is parameter for p in g["params"])]
            self.total = self.total + (rate[0] * parameter.grad if rate else 0)

    gradients = Gradients()
    module = fitted(tmp_path, Unfreeze(), gradients, optimizer=partial(SGD, lr=0.1))
    moved = make("bert").get_parameter(f"{DENSE}.weight") - module.model.get_parameter(f"{DENSE}.weight")
    torch.testing.assert_close(moved, gradients.total)


SCHEDULES: dict[str, Any] = {
    "LinearWarmup": LinearWarmup,
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
    "multiplicative": partial(lr_scheduler.MultiplicativeLR, lr_lambda=lambda step: 0.9),
    "step": partial(lr_scheduler.StepLR, step_size=2),
    "several steps": partial(lr_scheduler.MultiStepLR, milestones=[2, 3]),
    "constant": partial(lr_scheduler.ConstantLR, factor=0.5, total_iters=4),
    "linear": partial(lr_scheduler.LinearLR, total_iters=6),
    "exponential": partial(lr_scheduler.ExponentialLR, gamma=0.9),
    "polynomial": partial(lr_scheduler.PolynomialLR, total_iters=8),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=4),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2, cycle_momentum=False),
    "sequential": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.ConstantLR(optimizer, 0.5, 2), lr_scheduler.ExponentialLR(optimizer, 0.9)], [3]
    ),
    "chained": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.5, 3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    ),
    "plateau": partial(lr_scheduler.ReduceLROnPlateau, patience=0, threshold=10.0, min_lr=[1e-20]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_moves_an_added_group_in_proportion_to_the_first(tmp_path: Path, name: str) -> None:
    rates = Rates()
    fitted(tmp_path, Unfreeze(lr=None), rates, lr_scheduler=SCHEDULES[name], max_epochs=4)
    assert [len(step) for step in rates.rates] == [1, 1] + [2] * 6
    proportions = [step[1] / step[0] for step in rates.rates[2:] if step[0] > 1e-9]
    assert proportions == pytest.approx([0.1] * len(proportions))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize("name", ["Lightning's", "by hand", "frozen first"])
def test_a_training_goes_on_from_before_and_after_the_unfreezing(tmp_path: Path, name: str) -> None:
    class Head(Unfreeze):
        """What the strategy trains may be frozen at first."""

        def freeze_before_training(self, pl_module: LightningModule) -> None:
            self.freeze(pl_module.model.classifier)

    kinds = {
        "Lightning's": Unfreeze,
        "by hand": ByHand,
        "frozen first": partial(Head, "classifier"),
    }

    def module(strategy: PEFTStrategy) -> PEFTModule:
        return SequenceClassification(make("bert", 0.1), strategy, optimizer=partial(AdamW, lr=1e-3))

    options: dict[str, Any] = {"callbacks": lambda: [kinds[name]()], "module": module, "accumulate_grad_batches": 2}
    whole, saved = train(tmp_path, save=tmp_path, **options)
    for moment in saved:
        again, _ = train(tmp_path, tmp_path / f"{moment}.ckpt", **options)
        for part in ("trained", "optimizer", "schedules", "random"):
            assert same(getattr(whole, part), getattr(again, part)), (moment, part)
    fresh = module(LoRA(rank=2, dropout=0.2))
    trainer = quiet_trainer(tmp_path)
    trainer.validate(fresh, loader(batches(ROWS, 3)), ckpt_path=tmp_path / f"{moment}.ckpt", verbose=False)
    assert fresh.adapter is not None
    assert same(fresh.adapter.state(), whole.trained)


def test_equal_values_do_not_keep_a_tensor_from_training(tmp_path: Path) -> None:
    """Lightning's helper takes two biases of zeros for one, and leaves the second out of its group."""

    class Zeros(Unfreeze):
        def freeze_before_training(self, pl_module: LightningModule) -> None:
            for path in (DENSE, "bert.encoder.layer.0.output.dense"):
                pl_module.model.get_submodule(path).bias.data.zero_()
            pl_module.model.get_parameter(f"{DENSE}.bias").requires_grad_(True)

    zeros = Zeros("bert.encoder.layer.0.output.dense")
    module = fitted(tmp_path, zeros, optimizer=partial(SGD, lr=0.0), max_epochs=3)
    assert module.verdict is not None
    assert "bert.encoder.layer.0.output.dense.bias" not in module.verdict.still
    assert f"{DENSE}.bias" in module.verdict.still  # by the rate of its own group


def test_a_base_in_half_precision_trains_it_in_float32(tmp_path: Path) -> None:
    base = make("bert").to(torch.bfloat16)
    module = SequenceClassification(base, LoRA(rank=2), lr_scheduler=constant)
    data = loader(batches(FEW, 2))
    quiet_trainer(tmp_path, [Unfreeze()], max_epochs=3, precision="bf16-mixed").fit(module, data)
    assert base.get_parameter(f"{DENSE}.weight").dtype == torch.float32
    assert module.verdict is not None
    assert module.verdict.still == []


def test_what_no_optimizer_holds_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"2 tensors were unfrozen, but the optimizer does not hold them.*{DENSE}"):
        fitted(tmp_path, ByHand(add=False))


class AtSetup(Callback):
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.model.get_submodule(DENSE).requires_grad_(True)


def test_what_is_unfrozen_before_the_training_needs_no_group(tmp_path: Path) -> None:
    """As the error above advises."""
    module = fitted(tmp_path, AtSetup())
    assert module.adapter is not None
    assert DENSE in module.adapter.trained
    assert module.verdict is not None
    assert module.verdict.still == []


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unfrozen after a callback had copied the task"):
        fitted(tmp_path, Unfreeze(), EMAWeightAveraging())

    class Bias(ByHand):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            bias = pl_module.model.get_parameter(f"{DENSE}.bias")
            if not bias.requires_grad:
                trainer.optimizers[0].add_param_group({"params": [bias.requires_grad_(True)]})

    with pytest.raises(UserError, match=rf"{DENSE}.bias were unfrozen, but their layers are quantized"):
        fitted(tmp_path, Bias(), Quantize(4))
