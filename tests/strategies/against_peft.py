"""HF PEFT as the oracle: the same adapter on a copy of the same model, and what is compared."""

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import Adapter, PEFTStrategy, attach

MATRICES = {
    "lora_A.default.weight": "deltas.default.A",
    "lora_B.default.weight": "deltas.default.B",
    "lora_embedding_A.default": "deltas.default.A",
    "lora_embedding_B.default": "deltas.default.B",
    "lora_magnitude_vector.default.weight": "deltas.default.m",
}
"""What stands in HF PEFT's names for the parts of a LoRA, and what in ours."""


def pair(model: nn.Module, strategy: PEFTStrategy, config: PeftConfig, **ours: Any) -> tuple[Adapter, PeftModel]:
    """Our adapter on the model and HF PEFT's on a copy of it, both made under one seed."""
    twin = copy.deepcopy(model)
    torch.manual_seed(7)
    adapter = attach(model, strategy, **ours)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(twin, config)
    return adapter, theirs


def by_our_names(theirs: nn.Module, endings: Mapping[str, str] = MATRICES) -> dict[str, nn.Parameter]:
    """The parameters that HF PEFT trains, by the names they have with us; `endings` are theirs to ours."""
    named = {}
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad and ".original_module." not in key:
            key = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            for end, ours in endings.items():
                key = key.replace(end, ours)
            named[key.replace(".base_layer.", ".")] = parameter
    return named


def stir(adapter: Adapter, theirs: nn.Module, endings: Mapping[str, str] = MATRICES) -> None:
    """The same noise on both, so that every matrix changes the output."""
    ours, named = adapter.parameters(), by_our_names(theirs, endings)
    assert ours.keys() == named.keys()
    torch.manual_seed(11)
    with torch.no_grad():
        for key, parameter in ours.items():
            if ".deltas." in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
            named[key].copy_(parameter.reshape(named[key].shape))


def losses(model: nn.Module, parameters: list[nn.Parameter], inputs: Any, steps: int = 20) -> list[float]:
    """The loss of each step of AdamW in train mode, from one seed."""
    model.train()
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    seen = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        seen.append(float(loss.detach()))
    return seen


def loss_of(model: nn.Module, inputs: Any) -> Tensor:
    """The model's own loss; for a plain model, the mean square of its output."""
    if isinstance(inputs, dict):
        loss: Tensor = model(**inputs).loss
        return loss
    return model(inputs).square().mean()


def output(model: nn.Module, inputs: Any) -> Tensor:
    """What the model computes: its logits."""
    if isinstance(inputs, dict):
        logits: Tensor = model(**inputs).logits
        return logits
    plain: Tensor = model(inputs)
    return plain


def parity_of(
    architecture: str, strategy: PEFTStrategy, config: PeftConfig, endings: Mapping[str, str] = MATRICES, **ours: Any
) -> dict[str, float]:
    """The largest relative errors between both sides on the tiny model: outputs, gradients, losses of 20 steps."""
    adapter, theirs = pair(make(architecture), strategy, config, **ours)
    inputs = inputs_for(architecture)
    theirs.eval()
    stir(adapter, theirs, endings)
    named, found = by_our_names(theirs, endings), {}
    found["outputs"] = largest_error([(output(adapter.model, inputs), output(theirs, inputs))])
    loss_of(adapter.model, inputs).backward()
    loss_of(theirs, inputs).backward()
    gradients = [(p.grad, named[key].grad) for key, p in adapter.parameters().items()]
    found["gradients"] = largest_error((o.reshape(t.shape), t) for o, t in gradients if o is not None or t is not None)
    own = losses(adapter.model, list(adapter.parameters().values()), inputs)
    others = losses(theirs, [p for p in theirs.parameters() if p.requires_grad], inputs)
    found["losses of 20 steps"] = max(abs(o - t) / max(1.0, abs(t)) for o, t in zip(own, others, strict=True))
    return found


def largest_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference between ours and theirs as a share of the largest value of theirs, however small it is."""
    compared = [(one.detach().double(), other.detach().double()) for one, other in pairs]
    assert all(one.shape == other.shape for one, other in compared)
    largest = max(float(other.abs().max()) for _, other in compared)
    return max(float((one - other).abs().max()) for one, other in compared) / largest


def relative_error(one: Tensor, other: Tensor) -> float:
    """The largest difference, absolute, or relative to the largest value where that is above 1."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype)
    scale = max(1.0, float(other.detach().abs().max()))
    return float((one.detach().double() - other.detach().double()).abs().max()) / scale


def assert_near(one: Tensor, other: Tensor, tolerance: float = 1e-6, where: str = "") -> None:
    """Equal within `tolerance`: absolute, or relative to the largest value where that is above 1."""
    assert relative_error(one, other) <= tolerance, where
