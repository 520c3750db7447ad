"""HF PEFT as the oracle: the same adapter on a copy of the same model, and what is compared."""

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from peftlight import Adapter, PEFTStrategy, attach

MATRICES = {"lora_A.default.weight": "A", "lora_B.default.weight": "B"}
MATRICES |= {"lora_embedding_A.default": "A", "lora_embedding_B.default": "B"}


def pair(model: nn.Module, strategy: PEFTStrategy, config: LoraConfig, **ours: Any) -> tuple[Adapter, PeftModel]:
    """Our adapter on the model and HF PEFT's on a copy of it, both made under one seed."""
    twin = copy.deepcopy(model)
    torch.manual_seed(7)
    adapter = attach(model, strategy, **ours)
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(twin, config)
    return adapter, theirs


def by_our_names(theirs: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that HF PEFT trains, by the names they have with us."""
    named = {}
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad and ".original_module." not in key:
            key = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            for end, matrix in MATRICES.items():
                key = key.replace(end, f"deltas.default.{matrix}")
            named[key.replace(".base_layer.", ".")] = parameter
    return named


def stir(adapter: Adapter, theirs: nn.Module) -> None:
    """The same noise on both, so that every matrix changes the output."""
    ours, named = adapter.parameters(), by_our_names(theirs)
    torch.manual_seed(11)
    with torch.no_grad():
        for key, parameter in ours.items():
            if ".deltas." in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
            named[key].copy_(parameter)


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


def assert_near(one: Tensor, other: Tensor, tolerance: float = 1e-6, where: str = "") -> None:
    """Equal within `tolerance`: absolute, or relative to the largest value where that is above 1."""
    assert (one.shape, one.dtype) == (other.shape, other.dtype), where
    scale = max(1.0, float(other.detach().abs().max()))
    difference = float((one.detach().double() - other.detach().double()).abs().max())
    assert difference <= tolerance * scale, f"{where}: {difference} at scale {scale}"
