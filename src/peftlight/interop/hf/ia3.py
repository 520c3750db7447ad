"""(IA)³ in HF PEFT's files: a column for each layer whose output is scaled, a row where the input is."""

import re
from collections.abc import Collection

from torch import nn

from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf import frame, renames
from peftlight.interop.hf.checks import Shapes, misshapen
from peftlight.interop.hf.config_fields import check_feed_forward, check_fields
from peftlight.interop.hf.targets import is_feed_forward
from peftlight.linear import is_linear, widths
from peftlight.strategies.ia3 import IA3, InputScale
from peftlight.strategy import Adapter

_NAMES = {"l": "ia3_l"}


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what the adapter does.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    inner = {site for site, delta in adapter.sites.items() if isinstance(delta, InputScale)}
    placed = {
        site: {"ia3_l": delta.get_parameter("l").detach().unsqueeze(0 if site in inner else 1)}
        for site, delta in adapter.sites.items()
    }
    config, tensors = frame.written(adapter, placed)
    named = _feed_forward_for(inner, adapter.sites, config["target_modules"])
    config |= {"peft_type": "IA3", "feedforward_modules": named, "fan_in_fan_out": frame.transposed(adapter)}
    return config, tensors


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that HF PEFT's files describe, to be put on `model` under `name`.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    config, tensors = renames.translated(config, tensors, model)
    check_fields(config, {"feedforward_modules", "init_ia3_weights"})
    check_feed_forward(config.get("feedforward_modules"))
    found = frame.found_in(config, tensors, model, {"ia3_l": "l"})
    inner = [site for site in found.matrices if is_feed_forward(config["feedforward_modules"], site)]
    problems = misshapen(found, model, _NAMES, lambda site, module: _shapes(module, site in inner))
    for own in found.matrices.values():
        own["l"] = own["l"].flatten()
    strategy = IA3(target_modules=frame.targets_of(config, found, model), feedforward_modules=inner)
    return frame.contents(config, strategy, found, model, name, _NAMES, problems)


def _shapes(module: nn.Module, inner: bool) -> Shapes | None:
    if not is_linear(module):
        return None
    inputs, outputs = widths(module)
    return {"l": (1, inputs) if inner else (outputs, 1)}


def _feed_forward_for(inner: Collection[str], sites: Collection[str], targets: str | list[str]) -> str | list[str]:
    """The shortest `feedforward_modules` that means exactly `inner`; HF PEFT wants a list to be among the targets."""
    leaves = sorted({site.rpartition(".")[2] for site in inner})
    for named in (leaves, sorted(inner)):
        means = {site for site in sites if is_feed_forward(named, site)}
        if means == set(inner) and (isinstance(targets, str) or set(named) <= set(targets)):
            return named
    return f"(?:{'|'.join(re.escape(site) for site in sorted(inner))})"
