"""Strategies of the user's own that change one of ours in part: what is saved and folded is what is computed."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest
import torch

from models import inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.combine import combine
from peftlight.delta import Delta
from peftlight.errors import UserError
from peftlight.interop.json_files import read_json
from peftlight.strategies import HyperLoRA, LoRA
from peftlight.strategies.hyperlora import WrittenLoRA
from peftlight.strategies.lora_layers import LinearLoRA
from peftlight.strategies.lora_start import DifferenceLoRA
from peftlight.strategy import PEFTStrategy
from peftlight.strategy_spec import as_strategy, spec_of
from peftlight.tasks import SequenceClassification
from peftlight.updates import Updates


class Doubled(LinearLoRA):
    """Changes `forward`, and inherits `factors` and `fold`."""

    def forward(self, base, x):
        plain = base(x)
        return plain + 2 * (super().forward(base, x) - plain)


class Folded(Doubled):
    """Says how it folds."""

    def factors(self):
        A, B = super().factors()
        return A, 2 * B


class WronglyFolded(Doubled):
    """Says it wrongly."""

    def fold(self, weight, bias):
        return weight + 3 * self.scale * (self.B @ self.A).to(weight), bias


class Started(DifferenceLoRA):
    """Changes `forward`, and inherits `finished`."""

    def forward(self, base, x):
        plain = base(x)
        return plain + 2 * (super().forward(base, x) - plain)


def like(delta: Delta, kind: type[Delta]) -> Delta:
    """The same delta as of another class."""
    delta.__class__ = kind
    return delta


@dataclass
class Twice(LoRA):
    kind: str = "Doubled"

    def deltas(self, model):
        for name, delta in super().deltas(model):
            yield name, like(delta, {one.__name__: one for one in (Doubled, Folded, WronglyFolded, Started)}[self.kind])


class Written(WrittenLoRA):
    """Is saved as it is."""

    def forward(self, base, x):
        plain = base(x)
        return plain + 2 * (super().forward(base, x) - plain)

    def finished(self):
        return self


@dataclass
class WrittenTwice(HyperLoRA):
    """Inherits `finished`, which makes a LoRA of the recipe."""

    def deltas(self, model):
        for name, delta in super().deltas(model):
            yield name, like(delta, Written)


def moved(strategy: PEFTStrategy) -> Adapter:
    """An adapter whose tensors are not at their start."""
    adapter = attach(make("bert"), strategy)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return adapter


def logits(adapter: Adapter) -> torch.Tensor:
    with torch.no_grad():
        return adapter.model.eval()(**inputs_for("bert")).logits


@pytest.mark.parametrize(
    "strategy",
    [Twice(), Twice(kind="Folded"), Twice(kind="Started", init_lora_weights="pissa"), WrittenTwice(rank=2)],
    ids=lambda strategy: getattr(strategy, "kind", "WrittenTwice"),
)
def test_what_is_loaded_computes_what_was_saved(strategy: PEFTStrategy, tmp_path: Path) -> None:
    adapter = moved(strategy)
    save_adapter(adapter, tmp_path / "saved")
    config = read_json(tmp_path / "saved" / "adapter_config.json")
    assert config["peft_type"] == f"PEFTLIGHT_{type(strategy).__name__.upper()}"  # HF PEFT would compute a LoRA
    loaded = load_adapter(make("bert"), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(adapter))
    adapter.disable()
    assert (logits(loaded) - logits(adapter)).abs().max() > 1e-3


def test_a_fold_that_says_so_is_merged_and_combined() -> None:
    adapter = moved(Twice(kind="Folded"))
    expected = logits(adapter)
    adapter.merge()
    torch.testing.assert_close(logits(adapter), expected)
    adapter.unmerge()
    assert len(Updates(adapter))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("Doubled", r"Doubled\.\w+ is not what Doubled.forward computes.* 0\.5 .*inherited from LinearLoRA: write"),
        ("WronglyFolded", r"WronglyFolded\.fold is not what WronglyFolded.forward computes.* 0\.5 "),
    ],
)
def test_a_fold_that_is_another_is_used_for_nothing(kind: str, says: str) -> None:
    adapter = moved(Twice(kind=kind))
    expected = logits(adapter)
    uses: list[Callable[[], object]] = [adapter.merge, lambda: Updates(adapter), lambda: combine([adapter], [1.0])]
    for use in uses:
        with pytest.raises(UserError, match=says if kind == "Doubled" else says.replace(r"\.fold", r"\.\w+")):
            use()
    assert torch.equal(logits(adapter), expected)


@dataclass
class Fields(LoRA):
    sides: tuple[int, int] = (1, 2)
    extra: dict[str, list[float]] = field(default_factory=lambda: {"a": [0.5]})
    one: PEFTStrategy | None = None


def test_plain_fields_come_back_as_they_were() -> None:
    given = Fields(sides=(3, 4), extra={"b": [1.0]}, one=LoRA(rank=3))
    again = as_strategy(spec_of(given))
    assert again == given
    assert isinstance(again, Fields)
    assert again.sides == (3, 4)


class Side(Enum):
    left = 1


@dataclass
class Loose(LoRA):
    value: object = None


class Undecorated(LoRA):
    gain: float = 1.0


class WithInit(LoRA):
    def __init__(self, gain: float = 1.0, **options) -> None:
        super().__init__(**options)
        self.gain = gain


class Narrowed(LoRA):
    def __init__(self, rank: int = 2) -> None:
        super().__init__(rank=rank)


class NoDataclass(PEFTStrategy):
    def __init__(self, rank: int = 2) -> None:
        self.rank = rank


@pytest.mark.parametrize(
    ("strategy", "says"),
    [
        *((Loose(value=value), r"Loose\.value is .*which a file cannot hold")
          for value in (Side.left, torch.ones(1), len, {1: 2}, {1, 2}, float("inf"), torch.float16, Path("a"))),
        (Undecorated(), "of the strategy Undecorated: gain.*@dataclass"),
        (WithInit(), "of the strategy WithInit: gain.*no __init__"),
        (Narrowed(), "of the strategy Narrowed: alpha.*no __init__"),
        (NoDataclass(), "of the strategy NoDataclass: rank.*@dataclass"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_no_file_could_hold_is_refused_before_the_training(strategy: PEFTStrategy, says: str) -> None:
    with pytest.raises(UserError, match=says):
        SequenceClassification(make("bert"), strategy)


@dataclass
class Odd(PEFTStrategy):
    """Its hooks give what they are told to."""

    given: object = None
    named: object = ()

    def deltas(self, model):
        return self.given

    def train(self, model):
        return self.named


QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("given", "named", "says"),
    [
        (None, (), r"Odd\.deltas gives None; expected any number of them, by `yield` or in a list"),
        ([LinearLoRA((1, 2), (2, 1), 1.0)], (), r"Odd\.deltas gives LinearLoRA.*; expected pairs"),
        ([(QUERY, torch.nn.Linear(2, 2))], (), r"Odd\.deltas gives a Linear for .*query'; expected a .*Delta"),
        ([(f"{QUERY}y", Delta())], (), r"Odd\.deltas names .*queryy', and .* has no such module\. Did you mean"),
        ([(QUERY, Delta()), (QUERY, Delta())], (), r"Odd\.deltas gives two deltas for .*query'.*Stack"),
        ((), "classifier", r"Odd\.train gives 'classifier'; expected any number"),
        ((), ["classifier", "pooler.biass"], r"Odd\.train names 'pooler\.biass', and .* no such module or parameter"),
    ],
    ids=lambda value: "",
)
def test_what_the_hooks_give_is_looked_at(given: object, named: object, says: str) -> None:
    model = make("bert")
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with pytest.raises(UserError, match=says):
        attach(model, Odd(given, named))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
