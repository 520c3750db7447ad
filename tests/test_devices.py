"""A model that is moved, or cast, while adapters are on it: what waits beside it, on and off."""

import copy

import pytest
import torch
from torch import nn

from models import inputs_for, make
from peftlight.adapters import Adapters
from peftlight.strategies import BitFit, LoRA
from peftlight.updates import Updates
from strategies.small import stirred

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def two(model: nn.Module) -> Adapters:
    """LoRA with a head, and biases; all off."""
    adapters = Adapters(model.eval())
    for name, strategy, heads in (("lora", LoRA(rank=2), ("classifier",)), ("biases", BitFit(), ())):
        adapter = adapters.attach(strategy, name, modules_to_train=heads)
        adapters.use(name)
        stirred(adapter)
    adapters.use()
    return adapters


@pytest.mark.parametrize("in_use", [None, "lora", "biases"])
def test_what_waits_beside_the_model_goes_where_the_model_goes(in_use: str | None) -> None:
    adapters = two(make("bert"))
    adapters.use(*([in_use] if in_use else []))
    adapters.model.to("meta")
    for adapter in adapters:
        updates = Updates(adapter)
        assert {value.device.type for value in adapter.state().values()} == {"meta"}
        assert all(updates.before(name).device.type == "meta" for name in updates.trained)
        kept = {**adapter.originals, **adapter.aside}
        assert kept
        assert {value.device.type for value in kept.values()} == {"meta"}


@NEEDS_CUDA
@pytest.mark.parametrize("in_use", [None, "lora", "biases"])
def test_all_that_adapters_do_works_on_a_model_that_was_moved(in_use: str | None) -> None:
    adapters = two(make("bert"))
    inputs = {key: value for key, value in inputs_for("bert").items() if key != "labels"}
    names = ["lora", None, "biases", "lora"]
    with torch.no_grad(), adapters.rows(names):
        expected = adapters.model(**inputs).logits
    changes = {adapter.name: {key: matrix.dense() for key, matrix in Updates(adapter).items()} for adapter in adapters}
    adapters.use(*([in_use] if in_use else []))
    adapters.model.to("cuda")
    with torch.no_grad(), adapters.rows(names):
        found = adapters.model(**{key: value.cuda() for key, value in inputs.items()}).logits
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
    for adapter in adapters:
        for key, matrix in Updates(adapter).items():
            torch.testing.assert_close(matrix.dense().cpu(), changes[adapter.name][key], rtol=1e-5, atol=1e-6)


def test_a_cast_of_the_model_leaves_what_waits_beside_it_so_that_switching_restores_every_bit() -> None:
    adapters = two(make("bert"))
    adapters.use("lora")
    base, own = copy.deepcopy(adapters["lora"].originals), copy.deepcopy(adapters["lora"].state())
    adapters.model.bfloat16()
    adapters.use()
    for name, value in base.items():
        assert torch.equal(adapters.model.get_parameter(name), value)
        assert adapters["lora"].state()[name].dtype == torch.bfloat16  # was in the model, and so was cast
        assert torch.equal(adapters["lora"].state()[name], own[name].bfloat16())
