"""P-tuning's network is the paper's, HF PEFT's with `compat: peft`, and is left out of what is saved."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptEncoderConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import PromptTuning, PTuning
from peftlight.virtual_tokens import VirtualTokens
from strategies.against_peft import assert_near, loss_of, losses, output, parity_of
from strategies.prompts import TASKS, endings, heads
from strategies.small import stirred

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
COUNT, WIDTH = 5, 24
PARTS = {"embedding.": "embedding.", "mlp_head.": "network.", "lstm_head.": "lstm."}
ENCODERS: list[Any] = ["mlp", "lstm"]


def parity(architecture: str, encoder: Any = "mlp") -> dict[str, float]:
    """HF PEFT's numbers, with everything that differs from ours switched to its way."""
    ours = PTuning(COUNT, encoder=encoder, encoder_hidden_size=WIDTH, compat="peft")
    theirs = PromptEncoderConfig(task_type=TASKS[architecture], num_virtual_tokens=COUNT, encoder_hidden_size=WIDTH,
                                 encoder_reparameterization_type=encoder.upper())  # fmt: skip
    return parity_of(architecture, ours, theirs, endings(architecture, PARTS), **heads(architecture))


def parity_lstm(architecture: str) -> dict[str, float]:
    return parity(architecture, "lstm")


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", TASKS)
def test_it_equals_hf_peft(name: str, encoder: Any) -> None:
    assert max(parity(name, encoder).values()) < 1e-5


def encoder_of(model: nn.Module) -> dict[str, Tensor]:
    """The network's tensors by their names in it."""
    return {name.partition("prompt.")[2]: p for name, p in model.state_dict().items() if ".prompt." in name}


def linear(x: Tensor, at: dict[str, Tensor], name: str) -> Tensor:
    return x @ at[f"{name}.weight"].T + at[f"{name}.bias"]


def mlp(at: dict[str, Tensor]) -> Tensor:
    """Three linear layers with ReLU between."""
    first = linear(at["embedding.weight"], at, "network.0").relu()
    return linear(linear(first, at, "network.2").relu(), at, "network.4")


def lstm(at: dict[str, Tensor]) -> Tensor:
    """Equation 5 of the paper: an MLP of both directions' states, with the cell written out."""
    ahead = one_way(at["embedding.weight"], at, "")
    back = one_way(at["embedding.weight"].flip(0), at, "_reverse").flip(0)
    return linear(linear(torch.cat([ahead, back], 1), at, "network.0").relu(), at, "network.2")


def one_way(rows: Tensor, at: dict[str, Tensor], direction: str) -> Tensor:
    state, cell, states = torch.zeros(WIDTH), torch.zeros(WIDTH), []
    for row in rows:
        gates = at[f"lstm.weight_ih_l0{direction}"] @ row + at[f"lstm.bias_ih_l0{direction}"]
        gates = gates + at[f"lstm.weight_hh_l0{direction}"] @ state + at[f"lstm.bias_hh_l0{direction}"]
        into, keep, new, out = gates.chunk(4)
        cell = keep.sigmoid() * cell + into.sigmoid() * new.tanh()
        state = out.sigmoid() * cell.tanh()
        states.append(state)
    return torch.stack(states)


@torch.no_grad()
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_virtual_tokens_are_what_the_equation_says(encoder: Any) -> None:
    model, plain = make("llama"), make("llama")
    layers = {"encoder_num_layers": 1} if encoder == "lstm" else {}
    stirred(attach(model, PTuning(COUNT, encoder=encoder, encoder_hidden_size=WIDTH, **layers)))
    prompt = {"mlp": mlp, "lstm": lstm}[encoder](encoder_of(model))
    ids = inputs_for("llama")["input_ids"]
    embedded = torch.cat([prompt.expand(len(ids), -1, -1), plain.get_input_embeddings()(ids)], 1)
    assert_near(model(ids).logits, plain(inputs_embeds=embedded).logits[:, COUNT:])


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", TASKS)
def test_every_tensor_gets_a_gradient_and_the_loss_falls(name: str, encoder: Any) -> None:
    model = make(name)
    adapter = attach(model, PTuning(COUNT, encoder=encoder))
    loss_of(model, inputs_for(name)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters().values())
    seen = losses(model, list(adapter.parameters().values()), inputs_for(name))
    assert seen[-1] < seen[0]


@torch.no_grad()
@pytest.mark.parametrize("compat", [None, "peft"])
@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_only_the_virtual_tokens_are_saved(name: str, encoder: Any, compat: Any, tmp_path: Path) -> None:
    model = make(name)
    dropout = {"encoder_dropout": 0.5} if encoder == "lstm" else {}
    adapter = attach(model, PTuning(COUNT, encoder=encoder, compat=compat, **dropout))
    stirred(adapter)
    expected, before = output(model, inputs_for(name)), set(adapter.state())
    model.train()
    save_adapter(adapter, tmp_path)
    assert all(module.training for module in model.modules())
    assert set(adapter.state()) == before
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (rows,) = (value for key, value in saved.items() if "classifier" not in key)  # which HF PEFT wants in any case
    assert rows.shape == (2 * COUNT if name == "t5" else COUNT, 32)
    other = make(name)
    loaded = load_adapter(other, tmp_path)
    assert loaded.strategy == PromptTuning(COUNT, init="random", compat=compat)
    assert_near(output(other, inputs_for(name)), expected)


def test_a_checkpoint_keeps_the_network() -> None:
    model, other = make("bert"), make("bert")
    adapter = attach(model, PTuning(COUNT, encoder="lstm"))
    stirred(adapter)
    attach(other, PTuning(COUNT, encoder="lstm")).load_state(adapter.state())
    assert torch.equal(output(other, inputs_for("bert")), output(model, inputs_for("bert")))
    assert encoder_of(other).keys() > {"lstm.weight_hh_l1_reverse", "network.2.bias"}


def test_dropout_acts_in_training_alone() -> None:
    model = make("bert")
    adapter = attach(model, PTuning(COUNT, encoder="lstm", encoder_dropout=0.5))
    stirred(adapter, 1.0)
    assert torch.equal(output(model, inputs_for("bert")), output(model, inputs_for("bert")))
    model.train()
    assert not torch.equal(output(model, inputs_for("bert")), output(model, inputs_for("bert")))
    twin = copy.deepcopy(adapter.sites["bert"])
    assert isinstance(twin, VirtualTokens)
    assert not torch.equal(twin.prompt(), twin.prompt())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "at least one virtual token; num_virtual_tokens is 0"),
        ({"encoder": "lsmt"}, "encoder is 'lsmt'; expected mlp, lstm. Did you mean 'lstm'"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size is at least 1; got 0"),
        ({"encoder": "lstm", "encoder_num_layers": 0}, "encoder_num_layers is at least 1; got 0"),
        ({"encoder": "lstm", "encoder_dropout": 1.0}, "up to, not including, 1; got 1.0"),
        ({"encoder_dropout": 0.1}, "belong to the LSTM: set encoder to lstm"),
        ({"encoder_num_layers": 3}, "belong to the LSTM: set encoder to lstm"),
        ({"encoder": "lstm", "encoder_dropout": 0.1, "encoder_num_layers": 1}, "encoder_num_layers is 1: set it to 2"),
        ({"compat": "hf"}, "compat is 'hf'; expected null, peft"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PTuning(**options)


def test_a_model_that_it_cannot_serve_is_refused() -> None:
    with pytest.raises(UserError, match="PTuning puts vectors before the embeddings of tokens"):
        attach(make("vit"), PTuning())
    with pytest.raises(UserError, match="PTuning: num_virtual_tokens is 99, but the model has 40 positions"):
        attach(make("gpt2"), PTuning(99))
