"""Callbacks that copy the task: they see all of it, average what trains alone, and go on from a checkpoint."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from models import make
from peftlight.callbacks import Quantize
from peftlight.errors import UserError
from peftlight.strategies import AdaLoRA, LoRA, Stack
from peftlight.tasks import CausalLM, SequenceClassification
from peftlight.tasks.copies import StandIn
from tasks.resuming import same, train
from tasks.small import QUIET, batches, class_rows, constant, loader, quiet_trainer, token_rows

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch"),
    pytest.mark.filterwarnings("ignore:EVA used all"),
]
ROWS = class_rows([5, 9, 4, 12], [0, 1, 2, 1])


def fitted(folder: Path, *callbacks: Callback, strategy: Any = None, **options: Any) -> SequenceClassification:
    module = SequenceClassification(make("bert"), strategy or LoRA(rank=2), lr_scheduler=constant)
    quiet_trainer(folder, callbacks, max_epochs=2, **options).fit(module, loader(batches(ROWS, 2)))
    return module


class Own(Callback):
    """A user's average, of torch's own class."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.counted = sum(parameter.numel() for parameter in pl_module.parameters())
        self.average = AveragedModel(pl_module, **self.options)
        mine = self.average.module.model
        self.shared = {name: mine.get_parameter(name) is p for name, p in pl_module.model.named_parameters()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.average.update_parameters(pl_module)


@pytest.mark.parametrize(
    "options",
    [{"avg_fn": get_ema_avg_fn(0.9)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, {}, {"use_buffers": True},
     {"multi_avg_fn": get_swa_multi_avg_fn(), "device": "cpu"}],
    ids=["formula", "lists", "mean", "buffers", "mean of lists"],
)  # fmt: skip
def test_a_users_average_sees_the_model_and_leaves_the_base_alone(tmp_path: Path, options: dict[str, Any]) -> None:
    own = Own(**options)
    module = fitted(tmp_path, own)  # the audit looks at the base
    assert module.adapter is not None
    trained = module.adapter.parameters()
    assert own.counted == sum(parameter.numel() for parameter in module.parameters())
    assert {name for name, shared in own.shared.items() if not shared} == set(trained)
    for name, value in trained.items():
        assert not torch.equal(own.average.module.model.get_parameter(name), value)
    assert set(own.average.state_dict()) == {"n_averaged", *(f"module.model.{name}" for name in module.adapter.state())}
    inputs = {key: value for key, value in batches(ROWS, 4)[0].items() if key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own.average.eval()(**inputs)  # it computes, with the shared base


def test_a_loop_over_a_copy_is_an_average_of_what_trains(tmp_path: Path) -> None:
    class Loop(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            self.ema = copy.deepcopy(pl_module)

        @torch.no_grad()
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
            theirs = dict(pl_module.model.named_parameters())
            for name, mine in self.ema.model.named_parameters():
                mine.mul_(0.9).add_(theirs[name], alpha=0.1)

        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            for mine, theirs in zip(self.ema.parameters(), pl_module.parameters(), strict=True):
                theirs.data.copy_(mine.data)

    module = fitted(tmp_path, Loop())
    assert module.verdict is not None
    assert module.verdict.still == []


@pytest.mark.parametrize("trained", [[], ["lm_head"]])
def test_tied_weights_are_met_once_in_the_copy_too(tmp_path: Path, trained: list[str]) -> None:
    class Look(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            made = copy.deepcopy(pl_module)
            self.names = [[name for name, _ in each.named_parameters()] for each in (pl_module, made)]
            self.own = {name for name, p in made.named_parameters() if not isinstance(p, StandIn)}
            self.trained = {name for name, p in pl_module.named_parameters() if p.requires_grad}

    look = Look()
    module = CausalLM(make("gpt2"), LoRA(rank=2, target_modules=["c_attn"]), trained_modules=trained)
    quiet_trainer(tmp_path, [look], max_steps=1).fit(module, loader(batches(token_rows([5, 6]), 2)))
    assert look.names[0] == look.names[1]
    assert look.own == look.trained


def test_a_copy_after_the_training_is_a_plain_one(tmp_path: Path) -> None:
    module = fitted(tmp_path)
    made = copy.deepcopy(module)
    (one, other) = (dict(each.model.named_parameters()) for each in (module, made))
    assert all(torch.equal(one[name], other[name]) and one[name] is not other[name] for name in one)


def test_a_stand_in_takes_nothing_and_gives_nothing() -> None:
    stand_in, plain = torch.empty(0).as_subclass(StandIn), torch.ones(2, 3)
    assert isinstance(0.9 * stand_in.detach() + (1 - 0.9) * plain, StandIn)
    assert isinstance(plain.lerp(stand_in, 0.5), StandIn)
    plain.copy_(stand_in)
    stand_in.copy_(plain)
    stand_in.data.mul_(2)
    assert plain.tolist() == torch.ones(2, 3).tolist()
    other: list[Tensor] = [torch.zeros(2), stand_in]
    torch._foreach_lerp_(other, [torch.ones(2), plain], 0.5)
    assert other[0].tolist() == [0.5, 0.5]
    differences = torch._foreach_sub([torch.ones(2), plain], other)
    assert [type(value) for value in differences] == [Tensor, StandIn]
    assert (stand_in.dtype, stand_in.device.type, stand_in.is_floating_point()) == (torch.float32, "cpu", True)


AVERAGES: dict[str, Callable[[], Callback]] = {
    "ema": lambda: EMAWeightAveraging(decay=0.7),
    "mean by lists": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.7)),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_a_resumed_average_is_that_of_the_undisturbed_training(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"callbacks": lambda: [AVERAGES[name]()], "max_epochs": 3}
    whole, saved = train(tmp_path, save=tmp_path, **options)
    moments = [moment for moment in saved if "epoch_end" in moment or name != "swa"]  # Lightning's SWA knows epochs
    for moment in moments[1::3] if name != "swa" else moments[:2]:
        again, _ = train(tmp_path, tmp_path / f"{moment}.ckpt", **options)
        assert same(whole.trained, again.trained), moment
        assert same(whole.optimizer, again.optimizer), moment
    content = torch.load(tmp_path / f"{moments[0]}.ckpt", weights_only=True)
    own = {f"model.{key}" for key in whole.trained}
    for state in (content["state_dict"], content.get("current_model_state", {})):
        assert set(state) <= own


def test_an_average_of_matrices_whose_shapes_the_data_decide_goes_on(tmp_path: Path) -> None:
    def eva() -> LoRA:
        return LoRA(rank=2, init_lora_weights="eva", target_modules=["query", "dense"])

    options: dict[str, Any] = {"callbacks": lambda: [AVERAGES["ema"]()], "strategy": eva}
    whole, _ = train(tmp_path, save=tmp_path, **options)
    assert len({value.shape for key, value in whole.trained.items() if key.endswith(".A")}) > 2
    again, _ = train(tmp_path, tmp_path / "02_batch_end.ckpt", **options)
    assert same(whole.trained, again.trained)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_a_base_in_few_bits_is_shared_too(tmp_path: Path, bits: Any) -> None:
    """The scales as well; and Quantize may stand behind the average."""

    class Look(Callback):
        def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            copied = averages._average_model.module.get_submodule(site).weight
            mine = pl_module.get_submodule(site).weight
            assert copied is mine
            for holder in (pl_module, averages._average_model.module):
                scales = getattr(holder.get_submodule(site), "quant_state", None)
                assert scales is getattr(mine, "quant_state", None)

    site = "model.bert.encoder.layer.0.intermediate.dense"
    averages = EMAWeightAveraging(decay=0.7)
    module = fitted(tmp_path, averages, Look(), Quantize(bits))
    assert module.verdict is not None
    assert module.verdict.still == []


def test_what_cannot_be_averaged_is_refused_by_name(tmp_path: Path) -> None:
    planned = AdaLoRA(init_r=4, target_r=2, initial_phase=1, final_phase=1)
    for strategy in (planned, Stack([LoRA(rank=2), planned])):
        with pytest.raises(UserError, match="EMAWeightAveraging does not go with AdaLoRA, which removes parts"):
            fitted(tmp_path, EMAWeightAveraging(), strategy=strategy)
    module = SequenceClassification(_WithNorm(), LoRA(rank=2, target_modules=["first"]), num_labels=3)
    with pytest.raises(UserError, match=r"StochasticWeightAveraging computes .* of norm belong to the frozen base"):
        quiet_trainer(tmp_path, [StochasticWeightAveraging(1e-2)]).fit(module, loader(batches(ROWS, 2)))


class _WithNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)


def test_a_task_that_has_no_model_yet_is_not_copied_in_silence(tmp_path: Path) -> None:
    module = SequenceClassification(make("bert"), LoRA(rank=2))
    trainer = quiet_trainer(tmp_path)
    module.trainer = trainer
    trainer.state.fn, trainer.training = "fit", True
    with pytest.raises(UserError, match="copied before its base was loaded"):
        copy.deepcopy(module)
