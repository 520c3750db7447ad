"""BitFit and Full equal plain training of the same parameters by hand."""

import copy

import pytest
import torch
from torch import nn

from models import inputs_for, make
from peftlight import attach
from peftlight.errors import UserError
from peftlight.strategies import BitFit, Full
from strategies.against_peft import losses

WITH_BIASES = ["bert", "roberta", "gpt2", "vit"]


@pytest.mark.parametrize("name", WITH_BIASES)
def test_bitfit_equals_training_the_biases_by_hand(name: str) -> None:
    model = make(name)
    twin = copy.deepcopy(model)
    for key, parameter in twin.named_parameters():
        parameter.requires_grad_(key.endswith(".bias"))
    adapter = attach(model, BitFit())
    assert {key for key, p in twin.named_parameters() if p.requires_grad} == set(adapter.parameters())
    ours = losses(model, list(adapter.parameters().values()), inputs_for(name))
    assert ours == losses(twin, [p for p in twin.parameters() if p.requires_grad], inputs_for(name))
    assert all(torch.equal(p, dict(twin.named_parameters())[key]) for key, p in model.named_parameters())


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
    model = make(name)
    twin = copy.deepcopy(model)
    adapter = attach(model, Full())
    assert set(adapter.parameters()) == {key for key, _ in twin.named_parameters()}
    ours = losses(model, list(adapter.parameters().values()), inputs_for(name))
    assert ours == losses(twin, list(twin.parameters()), inputs_for(name))
