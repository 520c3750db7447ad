"""Values of the base trained in place, through files: LayerNorm tuning, and BitFit as a LoRA of zeros."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig, LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn

from interop.exchange import (
    TASKS,
    changed,
    computed,
    config_in,
    heads,
    ours_is_read_by_both,
    quietly,
    saved,
    stir,
    theirs_is_read_by_us,
)
from models import inputs_for, make
from peftlight import PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import BitFit, LayerNormTuning, LoRA
from strategies.against_peft import assert_near

pytestmark = pytest.mark.filterwarnings("ignore")

NORMS = {
    "bert": ["LayerNorm"],
    "roberta": ["LayerNorm"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "t5": ["layer_norm", "final_layer_norm"],
    "vit": ["layernorm_before", "layernorm_after", "layernorm"],
    "llama_classifier": ["post_attention_layernorm"],
}


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_norms_that_we_write(name: str, chosen: bool, tmp_path: Path) -> None:
    strategy = LayerNormTuning(NORMS[name][:1] if chosen else None)
    ours_is_read_by_both(name, strategy, tmp_path, "LN_TUNING")


@pytest.mark.parametrize("name", NORMS)
def test_norms_that_peft_writes(name: str, tmp_path: Path) -> None:
    config = LNTuningConfig(
        target_modules=NORMS[name], task_type=TASKS.get(name), modules_to_save=heads(name), exclude_modules=["ln_1"]
    )
    assert isinstance(theirs_is_read_by_us(name, config, tmp_path).strategy, LayerNormTuning)


class WithNormedHead(nn.Module):
    """A head with a normalisation of its own, and one whose path is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"norm": nn.LayerNorm(6), "fc": nn.Linear(6, 6)})
        self.norm = nn.LayerNorm(6)
        self.head = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.block["fc"](self.block["norm"](x)).relu()))


def test_a_norm_within_a_head_is_written_with_the_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = WithNormedHead(), torch.randn(5, 6)
    adapter = attach(copy.deepcopy(base), LayerNormTuning(), modules_to_train=["head"])
    stir(adapter.parameters().values())
    save_adapter(adapter, tmp_path)
    expected = computed(adapter.model, x)
    assert torch.equal(computed(load_adapter(copy.deepcopy(base), tmp_path).model, x), expected)
    assert_near(computed(quietly(base, tmp_path), x), expected)


DENSE = "base_model.model.bert.pooler.dense.ln_tuning_layers."
NORM = "bert.encoder.layer.0.output.LayerNorm"
KEY = f"base_model.model.{NORM}.ln_tuning_layers."


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"some_option": 1}, {}, "not supported here: some_option=1"),
        ({"target_modules": ["LayerNorm", "query"]}, {}, "missing: ln_tuning_layers.weight of .*query, which"),
        ({}, {f"{KEY}bias": None}, f"missing: ln_tuning_layers.bias of {NORM}"),
        ({}, {f"{KEY}weight": None, f"{KEY}bias": None}, f"missing: .*{NORM}, which target_modules selects"),
        ({}, {f"{KEY}weight": torch.ones(31)}, rf"ln_tuning_layers.weight of {NORM} has shape \(31,\)"),
        ({}, {f"{DENSE}bias": torch.ones(32)}, "missing: .*weight of bert.pooler"),
        ({}, {f"{DENSE}bias": torch.ones(32), f"{DENSE}weight": torch.ones(32, 32)}, "dense are no normalisation"),
        ({}, {"base_model.model.x.ln_tuning_layers.bias": torch.ones(32)}, "unexpected: .*x.ln_tuning"),
    ],
)
def test_files_of_norms_that_do_not_fit_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, _ = saved("bert", LayerNormTuning(), tmp_path, [])
    before = {key: value.clone() for key, value in base.state_dict().items()}
    changed(tmp_path, config, tensors)
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_bias_that_a_norm_has_not(tmp_path: Path) -> None:
    base, _ = saved("llama", LayerNormTuning(), tmp_path, [])
    changed(tmp_path, {}, {"base_model.model.model.norm.ln_tuning_layers.bias": torch.ones(32)})
    with pytest.raises(UserError, match=r"unexpected: ln_tuning_layers.bias of model.norm"):
        load_adapter(base, tmp_path)


BIASED = [(name, "all") for name in ("bert", "roberta", "gpt2", "vit")]
BIASED += [(name, "query+mlp") for name in ("bert", "roberta", "vit")]


@pytest.mark.parametrize(("name", "biases"), BIASED)
def test_bitfit_that_we_write(name: str, biases: Any, tmp_path: Path) -> None:
    again = ours_is_read_by_both(name, BitFit(biases), tmp_path, "LORA").strategy
    assert isinstance(again, BitFit)
    assert again.biases == biases
    assert config_in(tmp_path)["r"] == 1
    matrices = [v for k, v in load_file(tmp_path / "adapter_model.safetensors").items() if ".lora_" in k]
    assert len(matrices) == 2
    assert not any(matrix.any() for matrix in matrices)


def test_bitfit_beside_a_head_that_is_not_trained(tmp_path: Path) -> None:
    """Its bias is one of the biases; HF PEFT wants the rest of the head in the file too."""
    base, adapter = saved("bert", BitFit(), tmp_path, [])
    expected = computed(adapter.model, inputs_for("bert"))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(computed(again.model, inputs_for("bert")), expected)
    assert again.parameters().keys() == adapter.parameters().keys()
    assert_near(computed(quietly(base, tmp_path), inputs_for("bert")), expected)


class WithoutLinearLayers(nn.Module):
    """All it has beside its head is a convolution and a normalisation with one more parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm, self.classifier = nn.Conv1d(2, 4, 3), OddLayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(self.convolution(x).mean(2)))


class OddLayerNorm(nn.LayerNorm):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


@pytest.mark.parametrize("strategy", [BitFit(), LayerNormTuning()])
def test_what_peft_cannot_hold_has_our_own_format(strategy: PEFTStrategy, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = WithoutLinearLayers(), torch.randn(5, 2, 7)
    adapter = attach(copy.deepcopy(base), strategy, modules_to_train=["classifier"])
    stir(adapter.parameters().values())
    save_adapter(adapter, tmp_path)
    assert config_in(tmp_path)["peft_type"] == f"PEFTLIGHT_{type(strategy).__name__.upper()}"
    assert torch.equal(computed(load_adapter(base, tmp_path).model, x), computed(adapter.model, x))


def test_a_lora_with_biases_stays_a_lora(tmp_path: Path) -> None:
    """A new LoRA's A is not zero, though its update is."""
    base = make("bert")
    save_adapter(attach(copy.deepcopy(base), LoRA(rank=2, bias="all")), tmp_path)
    assert isinstance(load_adapter(base, tmp_path).strategy, LoRA)


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_biases_that_peft_trained_beside_a_lora(name: str, tmp_path: Path) -> None:
    targets = {"gpt2": ["c_attn"], "vit": ["q_proj"]}.get(name)
    config = LoraConfig(r=2, bias="all", target_modules=targets, task_type=TASKS.get(name))
    assert isinstance(theirs_is_read_by_us(name, config, tmp_path).strategy, LoRA)


BIAS = "base_model.model.bert.encoder.layer.1.output.dense.bias"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {BIAS: None}, "missing: bert.encoder.layer.1.output.dense.bias"),
        ({}, {BIAS: torch.ones(31)}, r"output.dense.bias has shape \(31,\); in the model \(32,\)"),
        ({}, {BIAS.replace("bias", "weight"): torch.ones(32, 64)}, "unexpected: .*dense.weight differs from the base"),
        ({"bias": "none"}, {}, "unexpected: .* differs from the base, but the config does not say"),
        ({"task_type": ["SEQ_CLS"]}, {}, "task_type is .*; expected text"),
        ({"r": 2}, {}, r"lora_A of .* has shape \(1, 32\); the model and the config need \(2, 32\)"),
    ],
)
def test_files_of_biases_that_do_not_fit_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, _ = saved("bert", BitFit(), tmp_path, ["classifier"])
    before = {key: value.clone() for key, value in base.state_dict().items()}
    changed(tmp_path, config, tensors)
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
