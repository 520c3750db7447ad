"""Bottleneck adapters compute, train and refuse what their papers' equations say."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from models import MODELS, inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import BottleneckAdapter, Stack
from peftlight.strategies.activations import activation_named
from peftlight.strategies.parallel import ParallelInput
from strategies.against_peft import loss_of, losses, output
from strategies.by_equation import Values, beside, installed
from strategies.small import stirred

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

VARIANTS = ("houlsby", "pfeiffer", "parallel")


def equation(
    values: Values, site: str, h: Tensor, act: Callable[[Tensor], Tensor] = F.relu, scale: float = 1
) -> Tensor:
    """s up(act(down(h))), with layer norms where the values have them."""
    part = {key.rpartition(".bottleneck.")[2]: value for key, value in values.items() if key.startswith(f"{site}.")}
    if "norm_before.weight" in part:
        h = F.layer_norm(h, h.shape[-1:], part["norm_before.weight"], part["norm_before.bias"])
    inner = act(h @ part["down.weight"].T + part["down.bias"])
    outer = inner @ part["up.weight"].T + part["up.bias"]
    if "norm_after.weight" in part:
        outer = F.layer_norm(outer, outer.shape[-1:], part["norm_after.weight"], part["norm_after.bias"])
    return outer * part.get("scale", scale)


def parity_of_variant(architecture: str, variant: str) -> dict[str, float]:
    scale = 4.0 if variant == "parallel" else 1.0
    strategy = BottleneckAdapter(variant=variant, reduction_factor=4, scale=scale)
    return beside(architecture, strategy, installed(architecture, variant, equation, scale=scale)).errors()


def parity_houlsby(architecture: str) -> dict[str, float]:
    return parity_of_variant(architecture, "houlsby")


def parity_pfeiffer(architecture: str) -> dict[str, float]:
    return parity_of_variant(architecture, "pfeiffer")


def parity_parallel(architecture: str) -> dict[str, float]:
    return parity_of_variant(architecture, "parallel")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_it_equals_the_equation(name: str, variant: str) -> None:
    assert max(parity_of_variant(name, variant).values()) < 1e-5


OPTIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "norm before": ("pfeiffer", {"layer_norm": "before"}, {}),
    "norm after": ("parallel", {"layer_norm": "after"}, {}),
    "learned scale": ("parallel", {"scale": "learned"}, {}),
    "no residual": ("houlsby", {"residual": False}, {"residual": False}),
    "half the scale": ("houlsby", {"scale": 0.5}, {"scale": 0.5}),
    "normal init": ("houlsby", {"init": "normal"}, {}),
    "another activation": ("pfeiffer", {"activation": "leaky_relu"}, {"act": F.leaky_relu}),
}
"""The variant, our options, and what they change in the equation."""


@pytest.mark.parametrize("option", OPTIONS)
def test_options_equal_the_equation(option: str) -> None:
    variant, fields, changes = OPTIONS[option]
    strategy = BottleneckAdapter(variant=variant, reduction_factor=4, **fields)
    assert max(beside("vit", strategy, installed("vit", variant, equation, **changes)).errors().values()) < 1e-5


@pytest.mark.parametrize("option", OPTIONS)
def test_the_start_and_that_every_tensor_moves(option: str) -> None:
    variant, fields, _ = OPTIONS[option]
    strategy = BottleneckAdapter(variant=variant, reduction_factor=4, **fields)
    model, inputs = make("bert"), inputs_for("bert")
    before = output(model, inputs)
    adapter = attach(model, strategy)
    assert torch.equal(output(model, inputs), before) == strategy.starts_unchanged
    assert strategy.starts_unchanged == (option not in ("no residual", "normal init"))
    start = {key: p.detach().clone() for key, p in adapter.parameters().items()}
    seen = losses(model, list(adapter.parameters().values()), inputs)
    assert seen[-1] < seen[0]
    assert not [key for key, p in adapter.parameters().items() if torch.equal(p, start[key])]


def test_the_start_is_drawn_as_in_the_papers() -> None:
    values = attach(make("bert"), BottleneckAdapter(reduction_factor=4)).parameters()
    for key, parameter in values.items():
        value = parameter.detach()
        bound = 1 / math.sqrt(32) if key.endswith("down.weight") else 0
        assert float(value.abs().max()) <= bound, key
        assert bound == 0 or 0.3 < float(value.std()) / bound < 0.9, key  # a uniform one has 0.577
    normal = attach(make("bert"), BottleneckAdapter(reduction_factor=0.25, init="normal")).parameters()
    weights = torch.cat([value.detach().flatten() for key, value in normal.items() if key.endswith("weight")])
    assert float(weights.abs().max()) <= 0.02  # two deviations
    assert float(weights.std()) == pytest.approx(0.0088, rel=0.02)  # of a normal of 0.01 that is cut there


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_of_bert_by_hand(variant: str) -> None:
    """No hooks: attention, feed-forward part, residuals and norms written out, with the adapters where they belong."""
    model = make("bert")
    strategy = BottleneckAdapter(variant=variant, reduction_factor=4, activation="gelu")
    adapter = stirred(attach(model, strategy))
    layer, p = model.get_submodule("bert.encoder.layer.0"), dict(model.bert.encoder.layer[0].named_parameters())
    values = {key.removeprefix("bert.encoder.layer.0."): value for key, value in adapter.parameters().items()}

    def linear(name: str, h: Tensor) -> Tensor:
        return F.linear(h, p[f"{name}.weight"], p[f"{name}.bias"])

    def norm(name: str, h: Tensor) -> Tensor:
        return F.layer_norm(h, (32,), p[f"{name}.weight"], p[f"{name}.bias"], eps=1e-12)

    def adapted(site: str, h: Tensor, x: Tensor) -> Tensor:
        if not any(key.startswith(f"{site}.") for key in values):
            return h
        return h + equation(values, site, x if variant == "parallel" else h, F.gelu)

    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    heads = [linear(f"attention.self.{role}", x).view(2, 5, 4, 8).transpose(1, 2) for role in ("query", "key", "value")]
    weights = (heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(8)).softmax(-1)
    h = linear("attention.output.dense", (weights @ heads[2]).transpose(1, 2).reshape(2, 5, 32))
    x1 = norm("attention.output.LayerNorm", x + adapted("attention.output.dense", h, x))
    h = linear("output.dense", F.gelu(linear("intermediate.dense", x1)))
    expected = norm("output.LayerNorm", x1 + adapted("output.dense", h, x1))
    found = layer(x)
    assert torch.allclose(found[0] if isinstance(found, tuple) else found, expected, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_files_come_back(name: str, variant: str, tmp_path: Path) -> None:
    strategy = BottleneckAdapter(variant=variant, reduction_factor=4, scale="learned")
    model, inputs = make(name), inputs_for(name)
    adapter = stirred(attach(model, strategy))
    save_adapter(adapter, tmp_path)
    fresh = make(name)
    loaded = load_adapter(fresh, tmp_path)
    assert loaded.strategy == strategy
    assert torch.equal(output(fresh, inputs), output(model, inputs))


@pytest.mark.parametrize("variant", ["houlsby", "parallel"])
@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "t5", "vit"])
def test_recomputed_gradients_are_equal_and_nothing_is_kept(name: str, variant: str) -> None:
    strategy = BottleneckAdapter(variant=variant, reduction_factor=4, dropout=0.3)
    model, inputs = make(name, dropout=0.2), inputs_for(name)
    adapter = stirred(attach(model, strategy))
    gradients = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        torch.manual_seed(0)
        loss_of(model, inputs).backward()
        gradients.append({key: parameter.grad for key, parameter in adapter.parameters().items()})
        relays = [delta.relay for delta in adapter.sites.values() if isinstance(delta, ParallelInput)]
        assert bool(relays) == (variant == "parallel")
        assert all(not relay.held for relay in relays)
    assert all(torch.equal(value, gradients[1][key]) for key, value in gradients[0].items())


def test_dropout_lies_in_the_bottleneck_and_only_in_training() -> None:
    model, inputs = make("bert"), inputs_for("bert")
    adapter = stirred(attach(model, BottleneckAdapter(reduction_factor=4, dropout=0.5)))
    expected = beside("bert", BottleneckAdapter(reduction_factor=4), installed("bert", "houlsby", equation))
    assert torch.equal(output(model, inputs), output(expected.adapter.model, inputs))
    zeroed: list[float] = []
    up = adapter.sites["bert.encoder.layer.0.output.dense"].get_submodule("bottleneck.up")
    up.register_forward_pre_hook(lambda module, args: zeroed.append(float((args[0] == 0).float().mean())))
    output(model, inputs)
    output(model.train(), inputs)
    assert zeroed[1] > zeroed[0]


def test_an_output_layer_without_its_partner_is_an_error() -> None:
    adapter = attach(make("bert"), BottleneckAdapter(variant="parallel"))
    layer = adapter.model.get_submodule("bert.encoder.layer.0")
    with pytest.raises(UserError, match=r"layer.0.intermediate.dense was not called before"):
        layer.output.dense(torch.randn(2, 64))
    layer.intermediate.dense(torch.randn(2, 32))  # left behind, as by an interrupted forward
    twin, again = copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))
    for other in (twin, again):
        assert torch.equal(output(other.model, inputs_for("bert")), output(adapter.model, inputs_for("bert")))
        deltas = (
            other.sites["bert.encoder.layer.0.intermediate.dense"],
            other.sites["bert.encoder.layer.0.output.dense"],
        )
        assert deltas[0].relay is deltas[1].relay
        assert deltas[0].relay is not adapter.sites["bert.encoder.layer.0.intermediate.dense"].relay


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_the_parallel_one_compiles_without_a_graph_break(name: str) -> None:
    model, inputs = make(name), inputs_for(name)
    del inputs["labels"]
    stirred(attach(model, BottleneckAdapter(variant="parallel", reduction_factor=4)))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(2):
        assert torch.allclose(compiled(**inputs).logits, output(model, inputs), atol=1e-6)


def test_a_base_in_bfloat16() -> None:
    model = make("llama").bfloat16()
    adapter = attach(model, Stack([BottleneckAdapter(), BottleneckAdapter(variant="parallel")]))
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    assert output(model, inputs_for("llama")).dtype == torch.bfloat16


def test_ranges_of_layers_and_other_families() -> None:
    def sites(model: nn.Module, **fields: Any) -> list[str]:
        return list(attach(model, BottleneckAdapter(**fields)).sites)

    assert sites(make("llama"), layers="last 1") == ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]
    assert sites(family("opt", num_hidden_layers=1, word_embed_proj_dim=32, ffn_dim=64), variant="parallel") == [
        "decoder.layers.0.fc2",
        "decoder.layers.0.fc1",
    ]
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "d_model": 32}
    assert sites(family("bart", **sizes)) == [
        "encoder.layers.0.self_attn.out_proj",
        "encoder.layers.0.fc2",
        "decoder.layers.0.self_attn.out_proj",
        "decoder.layers.0.encoder_attn.out_proj",
        "decoder.layers.0.fc2",
    ]


def family(model_type: str, **sizes: Any) -> nn.Module:
    common = {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 50, "pad_token_id": 0}
    for role in ("encoder", "decoder"):
        common[f"{role}_attention_heads"] = 4
    return AutoModel.from_config(AutoConfig.for_model(model_type, **(common | sizes)))


MOE = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 2}


def test_blocks_that_it_does_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match=r"2 of 2 blocks of this MixtralModel: layers.0 has no feed-forward"):
        attach(family("mixtral", **MOE), BottleneckAdapter(variant="pfeiffer"))
    sizes = {**MOE, "num_experts": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1], "head_dim": 8}
    mixed = family("qwen3_moe", **sizes)
    with pytest.raises(UserError, match=r"1 of 2 blocks of this Qwen3MoeModel: .* Set layers to \[1\], or choose LoRA"):
        attach(mixed, BottleneckAdapter())
    assert len(attach(mixed, BottleneckAdapter(layers=[1])).sites) == 2
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2, enable_nested_tensor=False)
    with pytest.raises(UserError, match="no attention whose linear layers are called"):
        attach(encoder, BottleneckAdapter())
    assert len(attach(encoder, BottleneckAdapter(variant="parallel")).sites) == 4
    with pytest.raises(UserError, match="has no stack of blocks"):
        attach(nn.Sequential(nn.Linear(4, 4)), BottleneckAdapter())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"variant": "housby"}, "variant: 'housby' is not one of houlsby, pfeiffer, parallel. Did you mean 'houlsby'"),
    ({"layer_norm": "first"}, "layer_norm: 'first' is not one of none, before, after"),
    ({"init": "zeros"}, "Did you mean 'zero'"),
    ({"activation": "geluu"}, "activation: 'geluu' is not known. Did you mean 'gelu'"),
    ({"activation": "softmax"}, "activation: 'softmax' is not known"),
    ({"reduction_factor": 0}, "reduction_factor is above 0"),
    ({"dropout": 1.0}, "dropout is a share from 0"),
    ({"scale": 0.0}, "scale is a number other than 0"),
    ({"scale": "learnt"}, "or 'learned'; got 'learnt'"),
    ({"variant": "parallel", "residual": False}, "parallel has no such term"),
]


@pytest.mark.parametrize(("fields", "message"), BAD, ids=lambda value: str(value)[:30])
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        BottleneckAdapter(**fields)


def test_a_factor_that_leaves_no_width_is_refused() -> None:
    message = r"reduction_factor 33 leaves no width: bert.*attention.output.dense writes 32 features, .* at most 32"
    with pytest.raises(UserError, match=message):
        attach(make("bert"), BottleneckAdapter(reduction_factor=33))
    attach(make("bert"), BottleneckAdapter(reduction_factor=32))


def test_it_is_never_merged() -> None:
    adapter = attach(make("bert"), BottleneckAdapter(variant="parallel"))
    with pytest.raises(UserError, match="ParallelAdapter cannot be merged: no weight of the module computes the same"):
        adapter.merge()


@pytest.mark.parametrize(
    "name", ["gelu", "leaky_relu", "LeakyReLU", "swish", "gelu_new", "hardswish", "PReLU", "softplus"]
)
def test_activations_by_their_names(name: str) -> None:
    x = torch.linspace(-2, 2, 9)
    known = {"swish": lambda x: x * torch.sigmoid(x), "gelu_new": lambda x: F.gelu(x, approximate="tanh")}
    known |= {"LeakyReLU": F.leaky_relu, "PReLU": lambda x: torch.where(x > 0, x, 0.25 * x)}
    expected = known.get(name) or getattr(F, name)
    assert torch.allclose(activation_named(name)()(x), expected(x))
