"""HyperLoRA computes what the paper's network writes, and is saved as the plain LoRA that it wrote."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from models import MODELS, inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import HyperLoRA, LoRA
from strategies.against_peft import by_our_names, largest_error, loss_of, losses, output
from strategies.small import stirred

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def written(adapter: Adapter, layer: int, kind: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Equation 4 written out with the parameters by name: the factors of one site."""
    first = next(iter(adapter.sites))
    own = {name.removeprefix(f"{first}.deltas.default.network."): p for name, p in adapter.parameters().items()}
    x = torch.cat([own["task"], own["layer.weight"][layer], own["kind.weight"][kind]])
    for number in (0, 2):
        x = own[f"trunk.{number}.weight"] @ x + own[f"trunk.{number}.bias"]
        x = x * torch.sigmoid(x)
    a = own[f"heads_a.{kind}.weight"] @ x + own[f"heads_a.{kind}.bias"]
    b = own[f"heads_b.{kind}.weight"] @ x + own[f"heads_b.{kind}.bias"]
    return a.view(4, -1), b.view(-1, 4)


def parity(architecture: str) -> dict[str, float]:
    """The errors beside a LoRA with the equation's factors, in float64: the network amplifies what float32 rounds."""
    model, plain = make(architecture).double(), make(architecture).double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_for(architecture).items()}
    adapter = stirred(attach(model, HyperLoRA(rank=4, alpha=12)), 0.3)
    lora = attach(plain, LoRA(rank=4, alpha=12))
    places = [re.match(r".*?\.\d+", site)[0] for site in lora.sites]
    layers = list(dict.fromkeys(places))
    kinds = list(dict.fromkeys(site.rpartition(".")[2] for site in lora.sites))
    factors = []
    for site, place in zip(lora.sites, places, strict=True):
        factors += written(adapter, layers.index(place), kinds.index(site.rpartition(".")[2]))
    own = list(lora.parameters().values())
    with torch.no_grad():
        for parameter, factor in zip(own, factors, strict=True):
            parameter.copy_(factor)
    outputs = largest_error([(output(model, inputs), output(plain, inputs))])
    loss_of(model, inputs).backward()
    loss_of(plain, inputs).backward()
    trained = list(adapter.parameters().values())
    expected = torch.autograd.grad(factors, trained, [parameter.grad for parameter in own])
    gradients = largest_error((p.grad, gradient) for p, gradient in zip(trained, expected, strict=True))
    return {"outputs": outputs, "gradients": gradients}


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_a_lora_with_the_factors_of_the_equation(name: str) -> None:
    assert max(parity(name).values()) < 1e-10


def test_it_starts_unchanged_and_trains_every_tensor() -> None:
    model, inputs = make("bert"), inputs_for("bert")
    before = output(model, inputs)
    adapter = attach(model, HyperLoRA(rank=4))
    assert torch.equal(output(model, inputs), before)
    start = {name: value.detach().clone() for name, value in adapter.parameters().items()}
    seen = losses(model, list(adapter.parameters().values()), inputs)
    assert seen[-1] < seen[0]
    assert all(not torch.equal(value, start[name]) for name, value in adapter.parameters().items())


def test_what_is_saved_is_a_plain_lora_that_hf_peft_reads(tmp_path: Path) -> None:
    model, inputs = make("bert"), inputs_for("bert")
    adapter = stirred(attach(model, HyperLoRA(rank=4, layers="last 1")))
    save_adapter(adapter, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    fresh = make("bert")
    assert isinstance(load_adapter(fresh, tmp_path).strategy, LoRA)
    assert torch.allclose(output(fresh, inputs), output(model, inputs), atol=1e-6)
    theirs = PeftModel.from_pretrained(make("bert"), tmp_path, is_trainable=True).eval()
    assert torch.allclose(output(theirs, inputs), output(model, inputs), atol=1e-6)
    assert len(by_our_names(theirs)) >= 4
    merged = output(model, inputs)
    adapter.merge()
    assert torch.allclose(output(model, inputs), merged, atol=1e-5)


def test_layers_of_one_name_and_another_shape_are_kinds_of_their_own() -> None:
    adapter = attach(make("bert"), HyperLoRA(rank=4, target_modules=["dense"], exclude_modules=["pooler"]))
    network = next(iter(adapter.sites.values())).network
    assert len(network.shapes) == 3
    assert network.layer.num_embeddings == 2


@pytest.mark.parametrize(
    ("wrong", "message"), [({"hidden_size": 0}, "hidden_size is at least 1"), ({"rank": 0}, "rank")]
)
def test_wrong_sizes_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        HyperLoRA(**wrong)


def test_a_rank_above_the_layers_size_is_refused() -> None:
    with pytest.raises(UserError, match="32"):
        attach(make("bert"), HyperLoRA(rank=33))
