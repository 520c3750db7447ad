"""2,000 damaged adapter folders: each loads and computes right, or is refused and leaves the model as it was.

A share of them goes to the command line and into `Adapters` too, as a stranger's folder does.
"""

import copy
import random
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from interop.mutations import MARKER, mutate
from models import inputs_for, make
from peftlight import Adapter, Adapters, PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.cli import main
from peftlight.errors import UserError
from peftlight.opened import open_adapters
from peftlight.opening import Opening
from peftlight.strategies import (
    IA3,
    AdaLoRA,
    BitFit,
    BottleneckAdapter,
    Compacter,
    HyperLoRA,
    LayerNormTuning,
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    Stack,
    TrainableTokens,
    VeRA,
)

pytestmark = pytest.mark.slow
SECONDS = 10
"""For one folder, which takes a hundredth of one."""
MEMORY = 2 << 30
"""Beyond what the process has already."""
PARTS, EACH = 8, 250
COMMANDS = [["inspect", "--files_only", "true"], ["inspect"], ["push", "--repo", "me/mine"]]

METHODS: list[Callable[[], PEFTStrategy]] = [
    lambda: LoRA(rank=4),
    lambda: LoRA(rank=4, target_modules="all-linear", rank_pattern={"query": 2}, alpha_pattern={".*value": 3}),
    lambda: LoRA(rank=2, use_dora=True, bias="all", target_modules=r".*\.(query|key)"),
    lambda: AdaLoRA(init_r=6, target_r=4),
    lambda: VeRA(rank=8),
    lambda: VeRA(rank=8, save_projection=False),
    IA3,
    BitFit,
    LayerNormTuning,
    lambda: TrainableTokens([3, 4, 7]),
    lambda: BottleneckAdapter(reduction_factor=4),
    lambda: Compacter(reduction_factor=4),
    lambda: HyperLoRA(rank=4),
    lambda: PrefixTuning(num_virtual_tokens=3),
    lambda: PromptTuning(num_virtual_tokens=3),
    lambda: PTuning(num_virtual_tokens=3),
    lambda: Stack([LoRA(rank=2, target_modules=["value"]), BitFit()]),
]


class Saved:
    """One good adapter and what it computes."""

    def __init__(self, strategy: PEFTStrategy, folder: Path, base: Path) -> None:
        self.folder = folder
        adapter = attach(make("bert"), strategy, modules_to_train=["classifier"])
        torch.manual_seed(11)
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                parameter.add_(0.05 * torch.randn_like(parameter))
        known = {"name": str(base), "auto_class": "AutoModelForSequenceClassification"}
        encoder = {"encoder": "PlainTextEncoder"}
        save_adapter(adapter, folder, {"base": known, "data": {"source": "a/b", "encoder": encoder}, "seed": 1})
        again = load_adapter(make("bert"), folder)
        self.state, self.output = copied(again.state()), computed(again.model)
        torch.testing.assert_close(self.output, computed(adapter.model))


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> list[Saved]:
    root = tmp_path_factory.mktemp("good")
    make("bert").save_pretrained(root / "base")
    return [Saved(method(), root / str(number), root / "base") for number, method in enumerate(METHODS)]


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_folders(part: int, good: list[Saved], tmp_path: Path) -> None:
    model = make("bert")
    model.requires_grad_(True).classifier.weight.requires_grad_(False)
    before = Before(model)
    loaded = refused = 0
    for number in range(part * EACH, (part + 1) * EACH):
        rng = random.Random(number)
        case, folder = rng.choice(good), tmp_path / str(number)
        shutil.copytree(case.folder, folder)
        harmless, same_tensors = mutate(folder, rng)
        refusal = None
        try:
            with limited():
                adapter = load_adapter(model, folder, convert_pickle=harmless or rng.random() < 0.5)
                check_loaded(adapter, case, harmless, same_tensors)
                adapter.remove()
                model.requires_grad_(True).classifier.weight.requires_grad_(False)
            loaded += 1
        except UserError as error:
            refusal, refused = str(error), refused + 1
        except BaseException as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
        assert refusal is None or not harmless, f"case {number}: {refusal}"
        assert refusal is None or refusal.startswith(f"Cannot load the adapter in {folder}: "), f"case {number}"
        assert before.same(), f"case {number}"
        assert not list(tmp_path.rglob(MARKER)), f"case {number}"
        shutil.rmtree(folder)
    assert loaded > EACH // 10
    assert refused > EACH // 3


@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_folders_on_the_command_line(
    part: int, good: list[Saved], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever a folder holds, a command does its work or says what is wrong: exit code 0 or 2."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    codes = []
    for number in range(part * EACH, (part + 1) * EACH, 5):
        rng = random.Random(number)
        case, folder = rng.choice(good), tmp_path / "run" / "adapter"
        shutil.copytree(case.folder, folder)
        mutate(folder, rng)
        command, *options = COMMANDS[number // 5 % len(COMMANDS)]
        with limited():
            codes.append(main([command, str(folder), *options]))
        shown = capsys.readouterr()
        assert codes[-1] in (0, 2), f"case {number}: {command}: {shown.err}"
        assert command != "push" or codes[-1] == 2, f"case {number}"
        assert "\x1b" not in shown.out + shown.err, f"case {number}"
        shutil.rmtree(tmp_path / "run")
    assert {0, 2} == set(codes)


def test_damaged_folders_are_opened_or_refused(good: list[Saved], tmp_path: Path) -> None:
    model = make("bert")
    before, codes = Before(model), []
    for number in range(0, PARTS * EACH, 10):
        rng = random.Random(number)
        case, folder = rng.choice(good), tmp_path / "adapter"
        shutil.copytree(case.folder, folder)
        mutate(folder, rng)
        try:
            with limited():
                if number % 40:
                    adapters = Adapters(model)
                    adapters.load(folder, "one", convert_pickle=True)
                    adapters.use("one")
                    assert computed(model).isfinite().all()
                    adapters.delete("one")
                else:
                    open_adapters([str(folder)], Opening(base=str(case.folder.parent / "base")))
            codes.append(0)
        except UserError:
            codes.append(2)
        except BaseException as error:
            raise AssertionError(f"case {number}: {type(error).__name__}: {error}") from error
        model.requires_grad_(True)
        assert before.same(), f"case {number}"
        shutil.rmtree(folder)
        for left in tmp_path.glob("*-blob"):
            left.unlink()
    assert {0, 2} == set(codes)


def check_loaded(adapter: Adapter, case: Saved, harmless: bool, same_tensors: bool) -> None:
    """What was loaded is finite and runs; it is what was saved as far as that is still in the files."""
    state, output = adapter.state(), computed(adapter.model)
    assert all(value.isfinite().all() for value in state.values())
    assert output.shape == case.output.shape
    if same_tensors:
        assert state.keys() == case.state.keys()
        assert all(torch.equal(value, case.state[key]) for key, value in state.items())
    if harmless:
        assert torch.equal(output, case.output)


class Before:
    """A model as it is, to be compared with what it becomes."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.state = model, copied(model.state_dict())
        self.parameters = [(p, p.dtype, p.requires_grad) for p in model.parameters()]
        self.output = computed(model)

    def same(self) -> bool:
        """Values, names, kinds, what trains, and nothing installed."""
        now = self.model.state_dict()
        return (
            now.keys() == self.state.keys()
            and all(torch.equal(value, now[key]) for key, value in self.state.items())
            and all(
                p is own and (p.dtype, p.requires_grad) == (dtype, trains)
                for p, (own, dtype, trains) in zip(self.model.parameters(), self.parameters, strict=True)
            )
            and not any("forward" in module.__dict__ for module in self.model.modules())
            and torch.equal(computed(self.model), self.output)
        )


@contextmanager
def limited() -> Iterator[None]:
    """Time and memory for one folder."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of re, on patterns that may mean something else some day
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def computed(model: nn.Module) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs_for("bert")).logits
    return logits


def copied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return copy.deepcopy(dict(state))
