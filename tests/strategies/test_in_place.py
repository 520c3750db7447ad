"""BitFit and Full equal plain training of the same parameters by hand."""

import copy

import pytest
from torch import nn

from models import inputs_for, make
from peftlight import attach
from peftlight.errors import UserError
from peftlight.strategies import BitFit, Full
from strategies.against_peft import losses, relative_error

WITH_BIASES = ["bert", "roberta", "gpt2", "vit"]


def parity(method: str, architecture: str) -> dict[str, float]:
    """The differences from training the same parameters by hand, in the losses and in where they end."""
    model = make(architecture)
    twin = copy.deepcopy(model)
    for key, parameter in twin.named_parameters():
        parameter.requires_grad_(method == "full" or key.endswith(".bias"))
    adapter = attach(model, Full() if method == "full" else BitFit())
    assert {key for key, p in twin.named_parameters() if p.requires_grad} == set(adapter.parameters())
    ours = losses(model, list(adapter.parameters().values()), inputs_for(architecture))
    by_hand = losses(twin, [p for p in twin.parameters() if p.requires_grad], inputs_for(architecture))
    ends = zip(model.parameters(), twin.parameters(), strict=True)
    return {
        "losses of 20 steps": max(abs(one - other) for one, other in zip(ours, by_hand, strict=True)),
        "end": max(relative_error(one, other) for one, other in ends),
    }


@pytest.mark.parametrize("name", WITH_BIASES)
def test_bitfit_equals_training_the_biases_by_hand(name: str) -> None:
    assert max(parity("bitfit", name).values()) == 0


@pytest.mark.parametrize(
    ("name", "block", "layers"),
    [
        ("bert", "bert.encoder.layer.1.", ["attention.self.query", "intermediate.dense"]),
        ("vit", "vit.layers.0.", ["attention.q_proj", "mlp.fc1"]),
    ],
)
def test_the_subset_is_the_biases_of_queries_and_inner_layers(name: str, block: str, layers: list[str]) -> None:
    trained = attach(make(name), BitFit("query+mlp")).parameters()
    assert [key for key in trained if key.startswith(block)] == [f"{block}{layer}.bias" for layer in layers]
    assert len(trained) == 4


def test_the_subset_needs_a_layer_of_queries() -> None:
    with pytest.raises(UserError, match=r"c_attn makes queries, keys and values at once. Choose biases: all"):
        attach(make("gpt2"), BitFit("query+mlp"))


def test_bitfit_with_a_head() -> None:
    adapter = attach(make("bert"), BitFit(), modules_to_train=["classifier"])
    weights = {key for key in adapter.parameters() if not key.endswith(".bias")}
    assert weights == {"classifier.weight"}


def test_bitfit_takes_the_biases_of_attention_and_recurrent_layers() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2), nn.LSTM(4, 4))
    names = set(attach(model, BitFit()).parameters())
    assert names == {"0.in_proj_bias", "0.out_proj.bias", "1.bias_ih_l0", "1.bias_hh_l0"}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_bitfit_refuses_a_model_without_biases(name: str) -> None:
    model = make(name)
    with pytest.raises(UserError, match=r"BitFit trains biases, and this .* has none"):
        attach(model, BitFit())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_full_equals_plain_training(name: str) -> None:
    assert max(parity("full", name).values()) == 0
