"""(IA)³ through files: ours read by HF PEFT, and HF PEFT's by us, with its rule for the feed-forward part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config
from torch import Tensor

from interop.exchange import TASKS, changed, config_in, heads, ours_is_read_by_both, saved, theirs_is_read_by_us
from peftlight import load_adapter
from peftlight.errors import UserError
from peftlight.strategies import IA3

pytestmark = pytest.mark.filterwarnings("ignore")

PLACES = {
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "roberta": (["key", "value", "1.output.dense"], ["1.output.dense"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "vit": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "llama_classifier": (["k_proj", "up_proj"], []),
}
RECIPES: dict[str, dict[str, Any]] = {
    "the default": {},
    "outputs only": {"target_modules": "attention", "feedforward_modules": []},
    "all linear layers": {"target_modules": "all-linear"},
    "one layer": {"layers": "last 1"},
}


@pytest.mark.parametrize("variant", RECIPES)
@pytest.mark.parametrize("name", PLACES)
def test_what_we_write(name: str, variant: str, tmp_path: Path) -> None:
    ours_is_read_by_both(name, IA3(**RECIPES[variant]), tmp_path, "IA3")


@pytest.mark.parametrize("name", PLACES)
def test_what_peft_writes(name: str, tmp_path: Path) -> None:
    targets, inner = PLACES[name]
    config = IA3Config(
        target_modules=targets, feedforward_modules=inner, task_type=TASKS.get(name), modules_to_save=heads(name)
    )
    theirs_is_read_by_us(name, config, tmp_path)


def test_their_list_of_the_feed_forward_part_matches_in_the_middle_of_a_word(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["q", "wo", "o"], feedforward_modules=["o"], task_type="SEQ_2_SEQ_LM")
    adapter = theirs_is_read_by_us("t5", config, tmp_path)
    assert isinstance(adapter.strategy, IA3)
    assert {name.rpartition(".")[2] for name in adapter.strategy.feedforward_modules or ()} == {"o", "wo"}


def test_a_regular_expression_for_the_feed_forward_part(tmp_path: Path) -> None:
    config = IA3Config(
        target_modules=r".*\.(k_proj|down_proj)", feedforward_modules=r".*0.*down_proj", task_type="CAUSAL_LM"
    )
    adapter = theirs_is_read_by_us("llama", config, tmp_path)
    assert isinstance(adapter.strategy, IA3)
    assert adapter.strategy.feedforward_modules == ["model.layers.0.mlp.down_proj"]


def test_the_names_are_as_short_as_can_be(tmp_path: Path) -> None:
    saved("llama", IA3(), tmp_path / "llama", [])
    config = config_in(tmp_path / "llama")
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert config["feedforward_modules"] == ["down_proj"]
    saved("bert", IA3(), tmp_path / "bert", [])
    assert config_in(tmp_path / "bert")["feedforward_modules"] == [f"bert.encoder.layer.{n}.output.dense" for n in "01"]


KEY = "base_model.model.bert.encoder.layer.0.attention.self.key.ia3_l"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"feedforward_modules": None}, {}, "feedforward_modules is None; expected a list of names"),
        ({"feedforward_modules": [3]}, {}, r"feedforward_modules is \[3\]"),
        ({"feedforward_modules": "("}, {}, "feedforward_modules holds '\\(', which is not a regular expression"),
        ({"feedforward_modules": ["key"]}, {}, r"self.key has shape \(32, 1\); .* need \(1, 32\)"),
        ({"an_option": True}, {}, "not supported here: an_option=True"),
        ({}, {KEY: None}, "missing: ia3_l of .*0.attention.self.key, which target_modules selects"),
        ({}, {KEY: torch.ones(32)}, r"self.key has shape \(32,\)"),
        ({}, {"base_model.model.bert.embeddings.LayerNorm.ia3_l": torch.ones(32, 1)}, "of the class LayerNorm, which"),
        ({}, {"base_model.model.x.ia3_l": torch.ones(32, 1)}, "unexpected: .*x.ia3_l"),
        ({}, {"base_model.model.classifier.weight": None}, "missing: classifier.weight"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, _ = saved("bert", IA3(), tmp_path, ["classifier"])
    changed(tmp_path, config, tensors)
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert not any("deltas" in key for key in base.state_dict())
