"""Adapters that change something, and the scores by which merged models are compared."""

import torch
from torch import Tensor, nn

from models import inputs_for
from peftlight import Adapter, PEFTStrategy, attach
from peftlight.merging.probes import Probes, answers

HEADS = {"bert": ["classifier"], "roberta": ["classifier"], "vit": ["classifier"]}
NEVER = {"compacter", "houlsby", "mam", "p_tuning", "parallel_adapter", "pfeiffer", "prefix", "prompt"}


def probes_for(name: str) -> Probes:
    inputs = {key: value for key, value in inputs_for(name).items() if key != "labels"}
    if name == "t5":
        inputs["decoder_input_ids"] = inputs_for(name)["labels"]
    return Probes([inputs, {key: value[:1] for key, value in inputs.items()}])


def stirred(model: nn.Module, strategy: PEFTStrategy, heads: list[str] | None = None, by: float = 0.05) -> Adapter:
    adapter = attach(model, strategy, modules_to_train=heads or [])
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(by * torch.randn_like(parameter))
    return adapter


def scores(model: nn.Module, name: str) -> Tensor:
    return torch.cat([each.flatten() for each in answers(model, probes_for(name))])
