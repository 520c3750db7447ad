"""A paper's equation as the oracle: hooks on a second model compute it from the same numbers."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import Adapter, PEFTStrategy, attach
from strategies.against_peft import loss_of, losses, output
from strategies.small import stirred

Values = dict[str, Any]
"""What is trained, by the names in our model."""

# By hand: the output layers of the attention, that of the feed-forward part, and its first layer.
PLACES = {
    "bert": (r".*attention\.output\.dense", r".*layer\.\d\.output\.dense", r".*intermediate\.dense"),
    "roberta": (r".*attention\.output\.dense", r".*layer\.\d\.output\.dense", r".*intermediate\.dense"),
    "llama": (r".*o_proj", r".*down_proj", r".*gate_proj"),
    "gpt2": (r".*attn\.c_proj", r".*mlp\.c_proj", r".*c_fc"),
    "t5": (r".*(SelfAttention|EncDecAttention)\.o", r".*wo", r".*wi"),
    "vit": (r".*o_proj", r".*fc2", r".*fc1"),
}


def beside(name: str, strategy: PEFTStrategy, install: Callable[[nn.Module, Values], None]) -> "Pair":
    """Our stirred adapter on the tiny model, and a second model on which `install` puts the equation."""
    adapter, twin = stirred(attach(make(name), strategy)), make(name).requires_grad_(False)
    values: Values = {key: p.detach().clone().requires_grad_() for key, p in adapter.parameters().items()}
    install(twin, values)
    return Pair(adapter, twin, values, inputs_for(name))


class Pair:
    """Both sides, and how far they are apart."""

    def __init__(self, adapter: Adapter, twin: nn.Module, values: Values, inputs: dict[str, Tensor]) -> None:
        self.adapter, self.twin, self.values, self.inputs = adapter, twin, values, inputs

    def errors(self) -> dict[str, float]:
        """The largest errors relative to the largest value: outputs, gradients, losses of 20 steps."""
        found = {"outputs": error(output(self.adapter.model, self.inputs), output(self.twin, self.inputs))}
        loss_of(self.adapter.model, self.inputs).backward()
        loss_of(self.twin, self.inputs).backward()
        largest = max(float(value.grad.abs().max()) for value in self.values.values())
        found["gradients"] = max(
            float((parameter.grad - self.values[key].grad).abs().max()) / largest
            for key, parameter in self.adapter.parameters().items()
        )
        ours = losses(self.adapter.model, list(self.adapter.parameters().values()), self.inputs)
        theirs = losses(self.twin, list(self.values.values()), self.inputs)
        found["losses of 20 steps"] = error(torch.tensor(ours), torch.tensor(theirs))
        return found


def error(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    one, other = one.detach(), other.detach()
    return float((one - other).abs().max() / other.abs().max())


def installed(name: str, variant: str, change: Callable[..., Tensor], residual: bool = True, **more: Any) -> Any:
    """What puts bottlenecks of the variant on a model, by hooks; `change` is the equation of (values, site, input)."""
    attention, last, first = PLACES[name]

    def after(module: nn.Module, site: str, values: Values) -> None:
        kept = 1 if residual else 0
        module.register_forward_hook(lambda module, args, h: kept * h + change(values, site, h, **more))

    def parallel(module: nn.Module, site: str, source: nn.Module, values: Values) -> None:
        seen: list[Tensor] = []
        source.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        module.register_forward_hook(lambda module, args, h: h + change(values, site, seen.pop(), **more))

    def install(twin: nn.Module, values: Values) -> None:
        ends, sources = matched(twin, last), matched(twin, first)
        if variant == "parallel":
            for (site, module), source in zip(ends.items(), sources.values(), strict=True):
                parallel(module, site, source, values)
            return
        for site, module in (ends | matched(twin, attention) if variant == "houlsby" else ends).items():
            after(module, site, values)

    return install


def matched(model: nn.Module, pattern: str) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if re.fullmatch(pattern, name)}
