"""What no delta reaches is said with its size: the experts of a mixture, before all."""

import io

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as Qwen3Moe

from models import make
from peftlight.coverage import Weights
from peftlight.errors import UserError
from peftlight.report import table_of, without_delta
from peftlight.strategies import IA3, Full, LoRA, PrefixTuning, Stack
from peftlight.strategy import Adapter, PEFTStrategy, attach

HIDDEN, INNER, EXPERTS, LAYERS, WORDS = 32, 48, 4, 2, 100
SIZES = {"vocab_size": WORDS, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
MIXTURES = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=INNER, num_local_experts=EXPERTS)),
    "qwen3_moe": lambda: Qwen3Moe(Qwen3MoeConfig(**SIZES, moe_intermediate_size=INNER, num_experts=EXPERTS)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**SIZES, intermediate_size=INNER, num_local_experts=EXPERTS)),
}
BOTH_WAYS = LAYERS * EXPERTS * HIDDEN * INNER
"""Numbers of one of the experts' three products, in all layers."""


def shown(adapter: Adapter) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(table_of(adapter))
    return " ".join(out.getvalue().split())


@pytest.mark.parametrize("name", MIXTURES)
def test_all_linear_says_that_the_experts_stay_as_they_are(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = MIXTURES[name]()
    whole = sum(p.numel() for p in model.parameters())
    adapter = attach(model, LoRA(rank=2, target_modules="all-linear"))
    left = {each.name.removeprefix("model.layers.*.mlp."): each for each in without_delta(adapter)}
    found = left["experts.gate_up_proj"]
    assert (found.count, found.dimensions, found.numbers) == (LAYERS, 3, 2 * BOTH_WAYS)
    assert left["experts.down_proj"].numbers == BOTH_WAYS
    assert left["model.embed_tokens.weight"] == Weights("model.embed_tokens.weight", 1, 2, WORDS * HIDDEN)
    assert "self_attn" not in " ".join(left)
    held = sum(each.numbers for each in left.values())
    words = f"no delta on {held / whole:.1%} of the base's {whole:,} numbers: 2 x model.layers.*.mlp.experts.gate_up_"
    assert words in shown(adapter)
    assert "all-linear leaves out weight matrices that are no layers" in caplog.text  # from Python, where no table is
    assert f"2 x model.layers.*.mlp.experts.down_proj (3-D, {BOTH_WAYS:,})" in caplog.text


def test_experts_are_trained_whole_as_the_notice_says(caplog: pytest.LogCaptureFixture) -> None:
    model = MIXTURES["mixtral"]()
    adapter = attach(model, LoRA(rank=2, target_modules="all-linear"), modules_to_train=["mlp.experts", "mlp.gate"])
    assert "all-linear leaves out" not in caplog.text
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.gate.weight"} <= set(adapter.parameters())
    assert [each.name for each in without_delta(adapter)] == ["model.embed_tokens.weight", "lm_head.weight"]


def test_an_expert_that_is_named_is_told_from_a_layer() -> None:
    model = MIXTURES["mixtral"]()
    with pytest.raises(UserError, match=r"'gate_up_proj' is no layer but a parameter.*trained_modules \[mlp.experts\]"):
        attach(model, LoRA(target_modules=["q_proj", "gate_up_proj"]))
    with pytest.raises(UserError, match=r"Name the layer: q_proj$"):
        attach(model, LoRA(target_modules=["self_attn.q_proj.weight"]))


class Mixed(nn.Module):
    """What holds matrices and is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({
            "fc": nn.Linear(4, 4), "attention": nn.MultiheadAttention(4, 2), "rnn": nn.LSTM(4, 3),
            "both": nn.Bilinear(4, 4, 2), "conv": nn.Conv1d(4, 4, 3),
        })])  # fmt: skip


def test_other_modules_that_hold_matrices(caplog: pytest.LogCaptureFixture) -> None:
    adapter = attach(Mixed(), LoRA(rank=2, target_modules="all-linear"))
    left = {each.name.removeprefix("layers.*."): each.numbers for each in without_delta(adapter)}
    assert left == {"attention.in_proj_weight": 48, "attention.out_proj.weight": 16, "rnn.weight_ih_l0": 48,
                    "rnn.weight_hh_l0": 36, "both.weight": 32, "conv.weight": 48}  # fmt: skip
    for name in ("in_proj_weight", "weight_ih_l0", "both.weight"):
        assert name in caplog.text
    assert "conv.weight" not in caplog.text  # a layer, only not a linear one


@pytest.mark.parametrize("strategy", [Full(), PrefixTuning(num_virtual_tokens=2)], ids=["Full", "PrefixTuning"])
def test_what_changes_no_layers_weight_leaves_none_out(strategy: PEFTStrategy) -> None:
    adapter = attach(make("bert"), strategy)
    assert without_delta(adapter) == []
    assert "no delta on" not in shown(adapter)


@pytest.mark.parametrize("strategy", [IA3(), Stack([PrefixTuning(num_virtual_tokens=2), IA3()])], ids=["IA3", "Stack"])
def test_deltas_of_other_kinds_and_of_stacks_are_counted(strategy: PEFTStrategy) -> None:
    adapter = attach(make("bert"), strategy, modules_to_train=["classifier"])
    left = {each.name.removeprefix("bert.encoder.layer.*.") for each in without_delta(adapter)}
    assert {"attention.self.query.weight", "intermediate.dense.weight"} <= left
    assert not {"attention.self.key.weight", "attention.self.value.weight", "output.dense.weight"} & left
    assert "classifier.weight" not in left


def test_a_tied_weight_is_changed_under_each_of_its_names() -> None:
    model = make("gpt2")
    left = [each.name for each in without_delta(attach(model, LoRA(rank=2, target_modules=["lm_head"])))]
    assert "transformer.wte.weight" not in left
    assert "transformer.wpe.weight" in left


def test_packed_weights_count_as_what_they_stand_for() -> None:
    pytest.importorskip("bitsandbytes")
    from peftlight.quantization import Quantization

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64))
    Quantization().apply(model)
    left = without_delta(attach(model, LoRA(rank=2, target_modules=["0"])))
    assert left == [Weights("*.weight", 2, 2, 2 * 64 * 128)]
    assert not torch.is_floating_point(model[1].weight)
