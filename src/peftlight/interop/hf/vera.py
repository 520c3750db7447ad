"""VeRA in HF PEFT's files: two vectors for each layer, and the shared matrices once, beside the model's own names."""

from torch import Tensor, nn

from peftlight.errors import UserError
from peftlight.interop.contents import Config, Contents, Tensors
from peftlight.interop.hf import frame, renames
from peftlight.interop.hf.checks import Shapes, misshapen
from peftlight.interop.hf.config_fields import check_fields, number, switch
from peftlight.linear import is_linear, widths
from peftlight.strategies.vera import VeRA, VeRADelta
from peftlight.strategy import Adapter

_VECTORS = {"lambda_b": "vera_lambda_b", "lambda_d": "vera_lambda_d"}
_SHARED = {"A": "base_model.vera_A", "B": "base_model.vera_B"}
_FIELDS = {
    "r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias", "init_weights",
    "layers_to_transform", "layers_pattern",
}  # fmt: skip


def to_peft(adapter: Adapter) -> tuple[Config, Tensors]:
    """The config and the tensors with which HF PEFT computes what the adapter does.

    Raises:
        UserError: HF PEFT's format cannot express the adapter.
    """
    strategy = adapter.strategy
    assert isinstance(strategy, VeRA)
    placed = {
        site: {theirs: delta.get_parameter(ours).detach() for ours, theirs in _VECTORS.items()}
        for site, delta in adapter.sites.items()
    }
    config, tensors = frame.written(adapter, placed)
    if strategy.save_projection:
        delta = next(iter(adapter.sites.values()))
        assert isinstance(delta, VeRADelta)
        tensors |= {theirs: delta.shared.get_buffer(ours) for ours, theirs in _SHARED.items()}
    return config | {
        "peft_type": "VERA",
        "r": strategy.rank,
        "d_initial": strategy.d_initial,
        "vera_dropout": strategy.dropout,
        "bias": "none",
        "projection_prng_key": strategy.projection_seed,
        "save_projection": strategy.save_projection,
        "fan_in_fan_out": frame.transposed(adapter),
    }, tensors


def from_peft(config: Config, tensors: Tensors, model: nn.Module, name: str = "default") -> Contents:
    """The adapter that HF PEFT's files describe, to be put on `model` under `name`.

    Where the file has no shared matrices they are drawn from the config's key, by HF PEFT's generator, on the CPU.

    Raises:
        UserError: the files use what is not supported here, or do not fit the model; the message lists everything.
    """
    config, tensors = renames.translated(config, tensors, model)
    check_fields(config, _FIELDS)
    if config.get("bias", "none") != "none":
        raise UserError(f"bias is {config['bias']!r}; VeRA trains no biases here.")
    rank, saved = number(config, "r", 256, int), switch(config, "save_projection", default=True)
    shared = {ours: tensors[theirs] for ours, theirs in _SHARED.items() if saved and theirs in tensors}
    rest = {key: value for key, value in tensors.items() if not (saved and key in _SHARED.values())}
    found = frame.found_in(config, rest, model, {theirs: ours for ours, theirs in _VECTORS.items()})
    strategy = VeRA(
        rank=rank,
        d_initial=float(number(config, "d_initial", 0.1)),
        dropout=float(number(config, "vera_dropout", 0.0)),
        target_modules=frame.targets_of(config, found, model),
        projection_seed=number(config, "projection_prng_key", 0, int),
        save_projection=saved,
    )
    problems = misshapen(found, model, _VECTORS, lambda _, module: _shapes(module, rank))
    if saved and not problems:
        problems = _wrong_projections(shared, [model.get_submodule(site) for site in found.matrices], rank)
    contents = frame.contents(config, strategy, found, model, name, _VECTORS, problems)
    first = next(path for path, _ in model.named_modules() if path in found.matrices)  # it stands for all that share
    contents.state.update({frame.key_of(first, name, f"shared.{ours}"): value for ours, value in shared.items()})
    return contents


def _shapes(module: nn.Module, rank: int) -> Shapes | None:
    return {"lambda_b": (widths(module)[1],), "lambda_d": (rank,)} if is_linear(module) else None


def _wrong_projections(shared: dict[str, Tensor], layers: list[nn.Module], rank: int) -> list[str]:
    """What is wrong with the shared matrices: they are as wide as the widest of the layers."""
    inputs, outputs = (max(sizes) for sizes in zip(*map(widths, layers), strict=True))
    wrong = [f"missing: {theirs}" for ours, theirs in _SHARED.items() if ours not in shared]
    for ours, value in shared.items():
        expected = (rank, inputs) if ours == "A" else (outputs, rank)
        if value.shape != expected:
            wrong.append(f"{_SHARED[ours]} has shape {tuple(value.shape)}; the model and the config need {expected}")
    return wrong
