"""Every optimizer and schedule of torch, bitsandbytes and transformers, as the command line makes it of its name."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import Adafactor

from models import make
from parsed import Parsed
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.tasks import MuonAndAdamW, SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, quiet_trainer

bitsandbytes = pytest.importorskip("bitsandbytes.optim")
pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is paged only beside a CUDA card"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
    pytest.mark.filterwarnings("ignore:.*required parameters without a type"),
]

MADE = batches(class_rows([5, 9, 4], [0, 1, 2]), 1)
TASK = ("--model=SequenceClassification", "--model.base_model=x", "--model.strategy=LoRA", "--data=SST2")


def _all(room: Any, kind: type) -> dict[str, Any]:
    known = {name: each for name, each in vars(room).items() if isinstance(each, type) and issubclass(each, kind)}
    return {f"{room.__name__}.{name}": each for name, each in known.items() if each is not kind and name[0] != "_"}


OPTIMIZERS: dict[str, Any] = {
    **_all(torch.optim, Optimizer), **_all(bitsandbytes, Optimizer),
    "transformers.optimization.Adafactor": Adafactor, "MuonAndAdamW": MuonAndAdamW,
}  # fmt: skip
SCHEDULES = {**_all(torch.optim.lr_scheduler, LRScheduler), "torch.optim.swa_utils.SWALR": torch.optim.swa_utils.SWALR}
for _of_objects in ("LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"):
    del SCHEDULES[f"torch.optim.lr_scheduler.{_of_objects}"]  # of functions, or of others that are made already
OF_BNB = {"lr": 0.1, "momentum": 0.9}
NEEDED: dict[str, dict[str, Any]] = {
    **{f"bitsandbytes.optim.{name}{bits}": OF_BNB for name in ("SGD", "LARS") for bits in ("", "8bit", "32bit")},
    "bitsandbytes.optim.PytorchLARS": OF_BNB,
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 2]},
    "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 1e-4, "max_lr": 1e-3},
    "OneCycleLR": {"max_lr": 1e-3, "total_steps": 10},
    "SWALR": {"swa_lr": 1e-3},
}
"""What has no default, or none with which it works."""
UNABLE = {
    "torch.optim.SparseAdam": "SparseAdam cannot take a step",
    "torch.optim.Muon": "--optimizer MuonAndAdamW",
    "transformers.optimization.Adafactor": "--lr_scheduler transformers.optimization.AdafactorSchedule",
}
"""Those that this training cannot have on any machine, and what the error says."""
ON_A_CARD = ("AdEMAMix32bit", "LAMB")
"""Names, or beginnings of names, of those that bitsandbytes does not make work on every CPU."""


@pytest.fixture(scope="module")
def parsed() -> Parsed:
    return Parsed()


def flags(option: str, path: str, needed: dict[str, Any]) -> list[str]:
    return [f"--{option}={path}", *(f"--{option}.{name}={value}" for name, value in needed.items())]


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Lists for tuples, which a configuration does not tell apart."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def fitted(folder: Path, made: Any, **options: Any) -> SequenceClassification:
    module = SequenceClassification(
        make("bert"), LoRA(rank=2), optimizer=made.optimizer, lr_scheduler=made.lr_scheduler, **options
    )
    quiet_trainer(folder).fit(module, Rows(MADE))
    return module


@pytest.mark.slow
@pytest.mark.parametrize("path", OPTIMIZERS)
def test_an_optimizer_has_its_own_defaults_and_steps_or_says_why_not(path: str, parsed: Parsed, tmp_path: Path) -> None:
    needed, kind = NEEDED.get(path, {}), OPTIMIZERS[path]
    made = parsed.module(*TASK, *flags("optimizer", path, needed))
    own = {"lr": 2e-4} if kind is torch.optim.AdamW else {}
    expected = kind([nn.Parameter(torch.ones(2, 2))], **needed, **own)
    found = made.optimizer([nn.Parameter(torch.ones(2, 2))])
    assert type(found) is kind
    assert plain(found.defaults) == plain(expected.defaults)
    for one, other in zip(found.param_groups, expected.param_groups, strict=True):
        assert plain({**one, "params": None}) == plain({**other, "params": None})
    if path in UNABLE:
        with pytest.raises(UserError, match=UNABLE[path]):
            fitted(tmp_path, made)
        return
    with contextlib.suppress(UserError) if any(name in path for name in ON_A_CARD) else contextlib.nullcontext():
        verdict = fitted(tmp_path, made).verdict
        assert verdict is not None
        assert len(verdict.still) < len(verdict.trained)


def test_what_the_errors_advise_works(parsed: Parsed, tmp_path: Path) -> None:
    adafactor = "--optimizer=transformers.optimization.Adafactor"
    for advice in (
        [adafactor, "--lr_scheduler=transformers.optimization.AdafactorSchedule"],
        [adafactor, "--optimizer.lr=1e-3", "--optimizer.relative_step=false"],
        ["--optimizer=MuonAndAdamW"],
    ):
        fitted(tmp_path, parsed.module(*TASK, *advice))
    fitted(tmp_path, parsed.module(*TASK, "--optimizer=Muon"), trained_modules=[])  # matrices alone


@pytest.mark.parametrize("path", SCHEDULES)
def test_a_schedule_has_its_own_defaults(path: str, parsed: Parsed) -> None:
    name, kind = path.rpartition(".")[2], SCHEDULES[path]
    needed = NEEDED.get(name, {})
    made = parsed.module(*TASK, "--optimizer=SGD", *flags("lr_scheduler", path, needed))
    parameters = [nn.Parameter(torch.ones(2, 2))]
    expected = kind(torch.optim.SGD(parameters, momentum=0.9), **needed).state_dict()
    found = made.lr_scheduler(torch.optim.SGD(parameters, momentum=0.9)).state_dict()
    assert plain(found) == plain(expected)


def test_our_own_schedule_hands_nothing_on(parsed: Parsed) -> None:
    config, _ = parsed.config(*TASK, "--lr_scheduler.warmup=0.5", "--lr_scheduler=StepLR", "--lr_scheduler.step_size=3")
    assert config["lr_scheduler"]["init_args"] == {"step_size": 3, "gamma": 0.1, "last_epoch": -1}
