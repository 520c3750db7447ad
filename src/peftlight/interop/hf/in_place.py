"""Values of the base that are trained in place, in HF PEFT's files: those of LayerNorm tuning, and BitFit's biases.

HF PEFT has no BitFit, but it reads the base's biases from the files of a LoRA, and so from those of a LoRA of zeros.
"""

from dataclasses import replace

from torch import nn

from peftlight.delta import CHILD
from peftlight.interop import own_format
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf import frame, lora, renames
from peftlight.interop.hf.checks import Shapes, misshapen
from peftlight.interop.hf.config_fields import check_fields
from peftlight.interop.hf.names import PREFIX
from peftlight.paths import inside
from peftlight.strategies.bitfit import BitFit
from peftlight.strategies.layer_norm import LayerNormTuning
from peftlight.strategies.lora import LoRA
from peftlight.strategy import Adapter

_NORMS = {"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"}


def norms_to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors of LayerNorm tuning: the whole new values of the layers.

    In our own format where a layer has more than a weight and a bias.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    norms, state = set(adapter.strategy.train(adapter.model)), adapter.state()
    if any(_shapes(adapter.model.get_submodule(norm)).keys() - _NORMS.keys() for norm in norms):
        return own_format.to_own(adapter)
    beside = replace(adapter, trained=[name for name in adapter.trained if name not in norms])
    whole, placed = frame.copied_whole(beside), dict[str, Tensors]()
    for key, value in state.items():
        norm, _, leaf = key.rpartition(".")
        if norm in norms and not inside(norm, whole):
            placed.setdefault(norm, {})[_NORMS[leaf]] = value
    config, tensors = frame.written(beside, placed)
    return config | {"peft_type": "LN_TUNING"}, tensors


def norms_from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The LayerNorm tuning that HF PEFT's files describe.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    config, tensors = renames.translated(config, tensors, model)
    check_fields(config, ())
    found = frame.found_in(config, tensors, model, {theirs: ours for ours, theirs in _NORMS.items()})
    problems = misshapen(found, model, _NORMS, lambda _, module: _shapes(module))
    for site, own in found.matrices.items():
        lacking = _shapes(model.get_submodule(site)).keys() - own.keys() - {"weight"}
        problems += [f"missing: {_NORMS.get(leaf, leaf)} of {site}" for leaf in sorted(lacking)]
    heads, state = frame.checked(config, found, model, {"weight": _NORMS["weight"]}, problems)
    state |= {f"{site}.{leaf}": value for site, own in found.matrices.items() for leaf, value in own.items()}
    targets = frame.targets_of(config, found, model)
    return Contents(LayerNormTuning(targets if isinstance(targets, list) else sorted(found.matrices)), heads, state)


def bitfit_to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors of a LoRA of zeros with BitFit's biases; our own format if no layer takes a LoRA.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    strategy = adapter.strategy
    assert isinstance(strategy, BitFit)
    carrier = LoRA(rank=1, alpha=1, bias="all" if strategy.biases == "all" else "none")
    sites = lora.empty(adapter)
    return lora.to_peft(replace(adapter, strategy=carrier, sites=sites)) if sites else own_format.to_own(adapter)


def holds_bitfit(config: Config, tensors: Tensors, model: nn.Module) -> bool:
    """Whether the files of a LoRA are those of a BitFit: zeros, and biases that are no part of a head."""
    if config.get("bias") not in ("all", "none") or not lora.is_empty(tensors):
        return False
    parameters = dict(model.named_parameters())
    named = [key.removeprefix(PREFIX).replace(".base_layer.", ".") for key in tensors]
    heads = frame.heads_of_config(config, model)
    return any(key in parameters and not inside(key, heads) for key in named)


def bitfit_from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The BitFit in files for which `holds_bitfit` is true.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    strategy = BitFit("all" if config["bias"] == "all" else "query+mlp")
    contents = lora.from_peft(config, tensors, model, name, list(strategy.train(model)))
    in_place = {key: value for key, value in contents.state.items() if CHILD not in key.split(".")}
    return Contents(strategy, contents.modules_to_train, in_place)


def _shapes(module: nn.Module) -> Shapes:
    return {leaf: tuple(parameter.shape) for leaf, parameter in module.named_parameters(recurse=False)}
