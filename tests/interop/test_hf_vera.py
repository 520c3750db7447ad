"""VeRA through files: ours read by HF PEFT, and HF PEFT's by us, with the shared matrices stored or drawn again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import VeraConfig
from safetensors.torch import load_file
from torch import Tensor

from interop.exchange import TASKS, changed, heads, ours_is_read_by_both, saved, theirs_is_read_by_us
from peftlight import load_adapter
from peftlight.errors import UserError
from peftlight.strategies import VeRA

pytestmark = pytest.mark.filterwarnings("ignore")

TARGETS = {
    "bert": ["query", "intermediate.dense"],
    "roberta": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "fc2"],
    "llama_classifier": ["q_proj", "down_proj"],
}


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_what_we_write(name: str, stored: bool, tmp_path: Path) -> None:
    strategy = VeRA(16, 0.3, 0.2, TARGETS[name], projection_seed=4, save_projection=stored)
    again = ours_is_read_by_both(name, strategy, tmp_path, "VERA").strategy
    assert isinstance(again, VeRA)
    assert (again.rank, again.d_initial, again.dropout, again.projection_seed) == (16, 0.3, 0.2, 4)
    matrices = {key for key in load_file(tmp_path / "adapter_model.safetensors") if "vera_A" in key or "vera_B" in key}
    assert matrices == ({"base_model.vera_A", "base_model.vera_B"} if stored else set())


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("name", TARGETS)
def test_what_peft_writes(name: str, stored: bool, tmp_path: Path) -> None:
    config = VeraConfig(
        r=12, target_modules=TARGETS[name], projection_prng_key=9, save_projection=stored, vera_dropout=0.1,
        task_type=TASKS.get(name), modules_to_save=heads(name),
    )  # fmt: skip
    adapter = theirs_is_read_by_us(name, config, tmp_path)
    assert isinstance(adapter.strategy, VeRA)
    assert (adapter.strategy.rank, adapter.strategy.projection_seed, adapter.strategy.dropout) == (12, 9, 0.1)


def test_some_layers_only(tmp_path: Path) -> None:
    config = VeraConfig(r=8, target_modules=["q_proj"], layers_to_transform=[1], task_type="CAUSAL_LM")
    strategy = theirs_is_read_by_us("llama", config, tmp_path).strategy
    assert isinstance(strategy, VeRA)
    assert strategy.target_modules == ["model.layers.1.self_attn.q_proj"]


def test_matrices_of_another_machine_are_taken_as_they_are(tmp_path: Path) -> None:
    base, _ = saved("bert", VeRA(8), tmp_path, [])
    changed(tmp_path, {}, {"base_model.vera_A": torch.ones(8, 32)})
    adapter = load_adapter(base, tmp_path)
    assert torch.equal(next(iter(adapter.sites.values())).shared.A, torch.ones(8, 32))


QUERY = "bert.encoder.layer.0.attention.self.query"
KEY = f"base_model.model.{QUERY}.vera_lambda_"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"bias": "vera_only"}, {}, "bias is 'vera_only'; VeRA trains no biases here"),
        ({"r": "eight"}, {}, "r is 'eight'; expected a whole number"),
        ({"save_projection": "yes"}, {}, "save_projection is 'yes'; expected true or false"),
        ({"a_new_option": 3}, {}, "not supported here: a_new_option=3"),
        ({"r": 9}, {}, rf"vera_lambda_d of {QUERY} has shape \(8,\); the model and the config need \(9,\)"),
        ({"save_projection": False}, {}, "unexpected: base_model.vera_A"),
        ({}, {"base_model.vera_B": None}, "missing: base_model.vera_B"),
        ({}, {"base_model.vera_A": torch.ones(8, 31)}, r"vera_A has shape \(8, 31\); .* need \(8, 32\)"),
        ({}, {f"{KEY}b": None}, f"missing: vera_lambda_b of {QUERY}"),
        ({}, {f"{KEY}{x}": None for x in "bd"}, f"missing: vera_lambda_b and vera_lambda_d of {QUERY}, which target"),
        ({}, {f"{KEY}b": torch.ones(31)}, rf"vera_lambda_b of {QUERY} has shape \(31,\)"),
        ({}, {"base_model.model.nowhere.vera_lambda_b": torch.ones(3)}, "unexpected: .*nowhere"),
        ({}, {"base_model.model.classifier.bias": None}, "missing: classifier.bias"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, _ = saved("bert", VeRA(8), tmp_path, ["classifier"])
    changed(tmp_path, config, tensors)
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert not any("deltas" in key for key in base.state_dict())


def test_a_config_without_the_fields_that_have_defaults(tmp_path: Path) -> None:
    base, _ = saved("bert", VeRA(256), tmp_path, [])
    changed(tmp_path, {"vera_dropout": ..., "r": ..., "d_initial": ..., "projection_prng_key": ..., "bias": ...}, {})
    strategy = load_adapter(base, tmp_path).strategy
    assert isinstance(strategy, VeRA)
    assert (strategy.rank, strategy.d_initial, strategy.projection_seed) == (256, 0.1, 0)
