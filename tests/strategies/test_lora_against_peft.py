"""LoRA equals HF PEFT's: weights at the start, outputs, gradients, and losses while training."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from models import MODELS, inputs_for, make
from peftlight import attach
from peftlight.strategies import LoRA
from strategies.against_peft import assert_near, by_our_names, loss_of, losses, output, pair, parity_of, stir

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "v_proj"],
}
EXTRA = {
    "bert": ["dense"],
    "roberta": ["dense"],
    "llama": ["down_proj"],
    "gpt2": ["c_proj"],
    "t5": ["wo"],
    "vit": ["fc1"],
}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "dropout in eval": ({"dropout": 0.3}, {"lora_dropout": 0.3}),
    "all biases": ({"bias": "all"}, {"bias": "all"}),
    "biases of the adapted": ({"bias": "lora_only"}, {"bias": "lora_only"}),
    "last layer": ({"layers": [1]}, {"layers_to_transform": [1]}),
    "one layer by number": ({"layers": "0"}, {"layers_to_transform": 0}),
}
"""Changes of our recipe and of HF PEFT's config."""


def recipes(name: str, variant: str = "plain", targets: list[str] | None = None) -> tuple[LoRA, LoraConfig]:
    ours, theirs = VARIANTS[variant]
    targets = targets or TARGETS[name]
    return (
        LoRA(rank=4, alpha=12, target_modules=targets, **ours),
        LoraConfig(r=4, lora_alpha=12, target_modules=targets, **theirs),
    )


def parity(architecture: str) -> dict[str, float]:
    return parity_of(architecture, *recipes(architecture))


@pytest.mark.parametrize("name", MODELS)
def test_it_starts_with_the_same_weights(name: str) -> None:
    targets = TARGETS[name] + EXTRA[name]
    adapter, theirs = pair(make(name), *recipes(name, targets=targets))
    named = by_our_names(theirs)
    assert adapter.parameters().keys() == named.keys()
    for key, parameter in adapter.parameters().items():
        assert torch.equal(parameter, named[key]), key


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_equal(name: str, variant: str) -> None:
    adapter, theirs = pair(make(name), *recipes(name, variant))
    theirs.eval()
    compare(adapter, theirs, inputs_for(name))


def compare(adapter: Any, theirs: nn.Module, inputs: Any, tolerance: float = 1e-6) -> None:
    stir(adapter, theirs)
    named = by_our_names(theirs)
    assert adapter.parameters().keys() == named.keys()
    assert_near(output(adapter.model, inputs), output(theirs, inputs), tolerance, "output")
    loss_of(adapter.model, inputs).backward()
    loss_of(theirs, inputs).backward()
    for key, parameter in adapter.parameters().items():
        assert (parameter.grad is None) == (named[key].grad is None), key
        if parameter.grad is not None:
            assert_near(parameter.grad, named[key].grad, tolerance, key)


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_the_same(name: str) -> None:
    adapter, theirs = pair(make(name), *recipes(name))
    stir(adapter, theirs)
    ours = losses(adapter.model, list(adapter.parameters().values()), inputs_for(name))
    other = losses(theirs, [p for p in theirs.parameters() if p.requires_grad], inputs_for(name))
    assert ours == pytest.approx(other, abs=1e-5)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_the_same_with_dropout(name: str) -> None:
    """Dropout of the model and of the adapter draw the same random numbers in the same order."""
    strategy, config = recipes(name, "dropout in eval")
    adapter, theirs = pair(make(name, dropout=0.1), strategy, config)
    ours = losses(adapter.model, list(adapter.parameters().values()), inputs_for(name), steps=8)
    other = losses(theirs, [p for p in theirs.parameters() if p.requires_grad], inputs_for(name), steps=8)
    assert ours == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_rank_and_alpha_patterns(name: str) -> None:
    first, second = TARGETS[name][0], EXTRA[name][0]
    patterns = {"rank_pattern": {first: 6, rf".*1.*\.{second}": 2}, "alpha_pattern": {second: 5}}
    strategy = LoRA(rank=4, alpha=12, target_modules=[first, second], **patterns)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=[first, second], **patterns)
    adapter, theirs = pair(make(name), strategy, config)
    assert {len(p) for key, p in adapter.parameters().items() if key.endswith(".A")} == {2, 4, 6}
    compare(adapter, theirs.eval(), inputs_for(name))


@pytest.mark.parametrize("name", MODELS)
def test_the_preset_for_all_linear_layers(name: str) -> None:
    task = "SEQ_CLS" if name in ("bert", "roberta") else None
    exclude = ["classifier"] if name == "vit" else None
    strategy = LoRA(rank=4, target_modules="all-linear")
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type=task, exclude_modules=exclude)
    heads = ["classifier"] if task else []
    adapter, theirs = pair(make(name), strategy, config, modules_to_train=heads)
    compare(adapter, theirs.eval(), inputs_for(name))


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5"])
def test_the_default_targets(name: str) -> None:
    adapter, theirs = pair(make(name), LoRA(rank=4), LoraConfig(r=4, lora_alpha=16))
    compare(adapter, theirs.eval(), inputs_for(name))


@pytest.mark.parametrize("layers", ["last 1", "first 1", "0-1", [0, -1]])
def test_ranges_of_layers(layers: str | list[int]) -> None:
    numbers = {"last 1": [1], "first 1": [0]}.get(str(layers), [0, 1])
    strategy = LoRA(rank=4, target_modules=["q_proj"], layers=layers)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], layers_to_transform=numbers)
    adapter, theirs = pair(make("llama"), strategy, config)
    compare(adapter, theirs.eval(), inputs_for("llama"))


@pytest.mark.parametrize("name", ["bert", "roberta", "llama_classifier", "vit"])
def test_a_head_beside_it(name: str) -> None:
    head = "score" if name.startswith("llama") else "classifier"
    strategy, config = recipes(name.removesuffix("_classifier"))
    config.modules_to_save = [head]
    adapter, theirs = pair(make(name), strategy, config, modules_to_train=[head])
    assert any(key.startswith(head) for key in adapter.parameters())
    compare(adapter, theirs.eval(), inputs_for(name))


def test_a_head_named_by_the_strategy() -> None:
    strategy, config = LoRA(rank=4, modules_to_save=["pooler.dense"]), LoraConfig(r=4, lora_alpha=16)
    config.modules_to_save = ["pooler.dense"]
    adapter, theirs = pair(make("bert"), strategy, config)
    compare(adapter, theirs.eval(), inputs_for("bert"))


@pytest.mark.parametrize(("name", "table"), [("bert", "word_embeddings"), ("llama", "embed_tokens"), ("gpt2", "wte")])
def test_embeddings(name: str, table: str) -> None:
    """BERT's and Llama's have a padding index."""
    strategy = LoRA(rank=4, target_modules=[table, *TARGETS[name]])
    config = LoraConfig(r=4, lora_alpha=16, target_modules=[table, *TARGETS[name]])
    adapter, theirs = pair(make(name), strategy, config)
    inputs = inputs_for(name)
    inputs["input_ids"][0, -1] = 0
    compare(adapter, theirs.eval(), inputs)


def test_the_row_of_the_padding_index_gets_no_gradient() -> None:
    table = nn.Sequential(nn.Embedding(10, 6, padding_idx=2))
    adapter = attach(table, LoRA(rank=2, target_modules=["0"]))
    table(torch.tensor([2, 3])).sum().backward()
    gradient = adapter.parameters()["0.deltas.default.A"].grad
    assert gradient is not None
    assert gradient[:, 2].abs().max() == 0
    assert gradient[:, 3].abs().max() > 0


def test_a_base_in_float64() -> None:
    strategy, config = recipes("bert")
    adapter, theirs = pair(make("bert").double(), strategy, config)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float64}
    compare(adapter, theirs.eval(), inputs_for("bert"), 1e-12)


def test_a_base_in_bfloat16() -> None:
    """HF PEFT rounds the starting weights to bfloat16 and back; `stir` makes the two equal."""
    strategy, config = recipes("llama")
    adapter, theirs = pair(make("llama").bfloat16(), strategy, config)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    assert output(adapter.model, inputs_for("llama")).dtype == torch.bfloat16
    compare(adapter, theirs.eval(), inputs_for("llama"))


class ConvNet(nn.Module):
    """Convolutions in one and two dimensions."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.image = nn.Conv2d(4, 8, (3, 2), **options)
        self.line = nn.Conv1d(8, 6, 3, **{"padding": 1, **options})
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.line(self.image(x).relu().mean(2)).mean(2))


CONVOLUTIONS: list[dict[str, Any]] = [{}, {"stride": 2}, {"padding": 1}, {"groups": 2}, {"bias": False}]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    strategy = LoRA(rank=4, alpha=12, target_modules=["image", "line"])
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["image", "line"])
    adapter, theirs = pair(ConvNet(**options), strategy, config)
    named = by_our_names(theirs)
    assert all(torch.equal(parameter, named[key]) for key, parameter in adapter.parameters().items())
    compare(adapter, theirs, torch.randn(5, 4, 9, 8))


DENSE: list[dict[str, Any]] = [
    {"dilation": 2},
    {"padding": 1, "padding_mode": "circular"},
    {"padding": 2, "padding_mode": "reflect", "dilation": 2},
    {"padding": "same"},
    {"groups": 2, "dilation": 2},
    *CONVOLUTIONS,
]


@pytest.mark.parametrize("options", DENSE, ids=str)
def test_a_convolution_equals_that_with_the_dense_update(options: dict[str, Any]) -> None:
    """HF PEFT takes over neither dilation nor padding mode, so the update is computed in full here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, (3, 2), **options))
    adapter = attach(model, LoRA(rank=4, alpha=12, target_modules=["0"]))
    a, b = adapter.parameters().values()
    nn.init.normal_(b, std=0.3)
    x = torch.randn(3, 4, 9, 8)
    with torch.no_grad():
        adapted = model(x)
        groups = model[0].groups
        rows = [part @ a.chunk(groups)[g].flatten(1) for g, part in enumerate(b.flatten(1).chunk(groups))]
        update = 3.0 * torch.cat(rows).view(8, 4, 3, 2)
        # With groups, each output channel sees all inputs through the update, so it is added as a layer of its own.
        plain = nn.Conv2d(4, 8, (3, 2), **{**options, "groups": 1, "bias": False})
        plain.weight.copy_(update)
        with adapter.disabled():
            expected = model(x) + plain(x)
    assert_near(adapted, expected, 2e-6)


def test_a_rank_that_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(Exception, match="rank 3 must be a multiple"):
        attach(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), LoRA(rank=3, target_modules=["0"]))
