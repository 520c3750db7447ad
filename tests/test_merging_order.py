"""Several adapters on one model that is merged into: whatever the order, the base comes back bit for bit."""

from itertools import permutations

import pytest
import torch

from models import inputs_for, make
from peftlight import attach
from peftlight.adapters import Adapters
from peftlight.errors import UserError
from peftlight.strategies import BitFit, LoRA


def two(first: list[str], second: list[str]) -> tuple[Adapters, dict[str, torch.Tensor]]:
    model = make("bert")
    base = {key: value.clone() for key, value in model.state_dict().items()}
    adapters = Adapters(model)
    for name, targets in (("a", first), ("b", second)):
        adapters.attach(LoRA(rank=2, target_modules=targets), name)
        for parameter in adapters[name].parameters().values():
            parameter.data.normal_()
    return adapters, base


def test_two_that_write_the_same_weights_are_not_merged_at_once() -> None:
    adapters, base = two(["query", "value"], ["query"])
    adapters.use("a", "b")
    adapters["a"].merge()
    with pytest.raises(UserError, match=r"'b' cannot be merged: 'a' is merged into .*query\.weight.*Unmerge that one"):
        adapters["b"].merge()
    adapters["a"].unmerge()
    adapters.use("b")
    adapters["b"].merge()
    adapters.delete("a")
    adapters.delete("b")
    assert all(torch.equal(value, base[key]) for key, value in adapters.model.state_dict().items())


@pytest.mark.parametrize("order", list(permutations(["a", "b", "off", "out"])), ids="-".join)
def test_merged_on_separate_layers_they_are_taken_back_in_any_order(order: tuple[str, ...]) -> None:
    adapters, base = two(["query"], ["value"])
    adapters.use("a", "b")
    inputs = inputs_for("bert")
    adapters.model.eval()
    expected = adapters.model(**inputs).logits
    adapters["a"].merge()
    adapters["b"].merge()
    torch.testing.assert_close(adapters.model(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    for step in order:
        if step == "off":
            adapters.use()
        elif step == "out":
            adapters.use(*adapters.names)
        else:
            adapters[step].unmerge()
    adapters.use()
    assert all(torch.equal(value, base[key]) for key, value in adapters.model.state_dict().items() if key in base)


def test_biases_that_another_trains_are_left_to_it() -> None:
    """A LoRA folds into weights alone, so a BitFit beside it is not in its way."""
    model = make("bert")
    lora, biases = attach(model, LoRA(rank=2), "lora"), attach(model, BitFit(), "biases")
    for parameter in [*lora.parameters().values(), *biases.parameters().values()]:
        parameter.data.normal_()
    model.eval()
    expected = model(**inputs_for("bert")).logits
    lora.merge()
    torch.testing.assert_close(model(**inputs_for("bert")).logits, expected, rtol=1e-4, atol=1e-5)
