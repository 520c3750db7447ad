"""Prefix tuning equals the paper's attention, a cache of real tokens, and, with `compat: peft`, HF PEFT."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartModel,
    BloomConfig,
    BloomModel,
    DeepseekV3Config,
    DeepseekV3Model,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_utils import AttentionInterface

from models import MODELS, VOCABULARY, inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import PrefixTuning, Stack
from peftlight.strategies.prefix_layers import Prefix, PrefixDelta
from strategies.against_peft import assert_near, by_our_names, largest_error, loss_of, losses, output, pair
from strategies.prompts import TASKS, heads, padded, rows
from strategies.small import stirred

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

LENGTH = 5
DECODERS = ["llama", "gpt2"]


# ---- HF PEFT


def their_tensors(adapter: Adapter, theirs: nn.Module) -> dict[str, Callable[[], tuple[Tensor, Tensor | None]]]:
    """For each of our names HF PEFT's value and gradient: a cut of its table or of its network's last layer."""
    named = by_our_names(theirs)
    table = {key.rpartition("default.")[2]: p for key, p in named.items() if "prompt_encoder" in key}
    found = {key.removeprefix("base_model."): whole(p) for key, p in named.items() if "prompt_encoder" not in key}
    sites = [site for site, delta in adapter.sites.items() if isinstance(delta, PrefixDelta)]
    # T5's layer i reads the slots 4i and 4i + 1 of twice as many as there are layers, over and over.
    step = 2 if getattr(adapter.model.config, "is_encoder_decoder", False) else 1
    for layer, site in enumerate(sites):
        name, place = f"{site}.deltas.default.prefix.", step * layer % len(sites)
        if "embedding.weight" in table and "transform.2.weight" not in table:
            width = table["embedding.weight"].shape[1] // len(sites) // 2
            found[f"{name}keys"] = cut(table["embedding.weight"], 1, 2 * place * width, width)
            found[f"{name}values"] = cut(table["embedding.weight"], 1, (2 * place + 1) * width, width)
        else:
            rows = len(table["transform.2.bias"]) // len(sites)
            found[f"{name}weight"] = cut(table["transform.2.weight"], 0, place * rows, rows)
            found[f"{name}bias"] = cut(table["transform.2.bias"], 0, place * rows, rows)
    trunk = f"{sites[0]}.deltas.default.prefix.trunk."
    parts = {"embedding": "embedding.weight", "hidden.weight": "transform.0.weight", "hidden.bias": "transform.0.bias"}
    found |= {f"{trunk}{ours}": whole(table[their]) for ours, their in parts.items() if "transform.0.bias" in table}
    return {key: found[key] for key in adapter.parameters()}


def whole(parameter: nn.Parameter) -> Callable[[], tuple[Tensor, Tensor | None]]:
    return lambda: (parameter, parameter.grad)


def cut(parameter: nn.Parameter, dim: int, start: int, length: int) -> Callable[[], tuple[Tensor, Tensor | None]]:
    def taken() -> tuple[Tensor, Tensor | None]:
        gradient = None if parameter.grad is None else parameter.grad.narrow(dim, start, length)
        return parameter.narrow(dim, start, length), gradient

    return taken


def sides(architecture: str, projected: bool, model: nn.Module | None = None) -> tuple[Adapter, nn.Module]:
    hidden = 24 if projected else None
    config = PrefixTuningConfig(
        num_virtual_tokens=LENGTH,
        task_type=TASKS[architecture],
        prefix_projection=projected,
        encoder_hidden_size=hidden,
    )
    strategy = PrefixTuning(LENGTH, projected, hidden, compat="peft")
    return pair(model or make(architecture), strategy, config, **heads(architecture))


def parity(architecture: str, projected: bool = False, model: nn.Module | None = None) -> dict[str, float]:
    adapter, theirs = sides(architecture, projected, model)
    theirs.eval()
    inputs, named = inputs_for(architecture), their_tensors(adapter, theirs)
    for key, parameter in adapter.parameters().items():
        assert torch.equal(parameter, named[key]()[0]), key  # one seed gives both
    found = {"outputs": largest_error([(output(adapter.model, inputs), output(theirs, inputs))])}
    loss_of(adapter.model, inputs).backward()
    loss_of(theirs, inputs).backward()
    found["gradients"] = max(share(p.grad, named[key]()[1]) for key, p in adapter.parameters().items())
    ours = losses(adapter.model, list(adapter.parameters().values()), inputs)
    others = losses(theirs, [p for p in theirs.parameters() if p.requires_grad], inputs)
    assert ours[-1] < ours[0]
    found["losses of 20 steps"] = max(abs(o - t) / max(1.0, abs(t)) for o, t in zip(ours, others, strict=True))
    return found


def share(one: Tensor | None, other: Tensor | None) -> float:
    """The largest difference as a share of the largest value, however small that is."""
    assert one is not None
    assert other is not None
    assert float(other.abs().max()) > 0
    return float((one - other).abs().max() / other.abs().max())


def parity_projected(architecture: str) -> dict[str, float]:
    return parity(architecture, projected=True)


@pytest.mark.parametrize("projected", [False, True], ids=["table", "network"])
@pytest.mark.parametrize("name", TASKS)
def test_it_equals_hf_peft(name: str, projected: bool) -> None:
    assert max(parity(name, projected).values()) < 1e-5


def test_an_odd_number_of_layers_gives_t5_another_order() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(**sizes, num_layers=3, dropout_rate=0.0, decoder_start_token_id=0))
    assert max(parity("t5", model=model.eval()).values()) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_it_generates_what_hf_peft_generates(name: str) -> None:
    adapter, theirs = sides(name, False)
    inputs = {key: value for key, value in inputs_for(name).items() if key != "labels"}
    if name != "t5":
        inputs = {key: value[1:] for key, value in inputs.items()}  # rows without padding on the right
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(adapter.model.generate(**inputs, **asked), theirs.generate(**inputs, **asked))


def test_compat_is_another_thing_where_positions_are_learned() -> None:
    inputs = inputs_for("gpt2")
    ours, theirs = (prefixed_model("gpt2", compat=compat)[0] for compat in (None, "peft"))
    assert not torch.allclose(output(ours, inputs), output(theirs, inputs), atol=1e-2)


def test_where_positions_rotate_hf_pefts_prefix_is_ours_turned_back() -> None:
    model, inputs = make("llama"), inputs_for("llama")
    (default, adapter), (compat, _) = prefixed_model("llama"), prefixed_model("llama", compat="peft")
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.tensor([[-LENGTH]]))  # (1, 1, width of a head)
    with torch.no_grad():
        for key, keys in adapter.parameters().items():
            if key.endswith("keys"):
                per_head = keys.view(LENGTH, 2, -1)
                first, second = per_head.chunk(2, dim=-1)
                keys.copy_((per_head * cos + torch.cat([-second, first], dim=-1) * sin).view_as(keys))
    assert_near(output(default, inputs), output(compat, inputs), 2e-6)


# ---- the paper


def prefixed_model(name: str, length: int = LENGTH, **options: Any) -> tuple[nn.Module, Adapter]:
    model = make(name)
    torch.manual_seed(2)
    return model, attach(model, PrefixTuning(length, **options))


CORES = {
    "bert": "bert.encoder.layer.1.attention.self",
    "roberta": "roberta.encoder.layer.1.attention.self",
    "llama": "model.layers.1.self_attn",
    "gpt2": "transformer.h.1.attn",
    "t5": "decoder.block.0.layer.0.SelfAttention",
    "vit": "vit.layers.1.attention",
}


def asked_of(name: str, core: Any, x: Tensor, mask: Tensor | None) -> dict[str, Any]:
    if name == "llama":  # rotated by nothing
        width = core.head_dim
        ones = torch.ones(len(x), x.shape[1], width)
        return {"position_embeddings": (ones, torch.zeros_like(ones)), "attention_mask": mask}
    return {"mask" if name == "t5" else "attention_mask": mask}


def by_equation(name: str, core: Any, x: Tensor, prefix: Prefix, visible: Tensor) -> Tensor:
    """softmax(q [P_k; K]ᵀ / √d) [P_v; V] with a bias of positions on the real columns, written out for each head."""
    if name == "gpt2":
        q, k, v = core.c_attn(x).chunk(3, dim=-1)
    else:
        layers = {"bert": ("query", "key", "value"), "roberta": ("query", "key", "value"), "t5": ("q", "k", "v")}
        q, k, v = (getattr(core, layer)(x) for layer in layers.get(name, ("q_proj", "k_proj", "v_proj")))
    batch, length, _ = x.shape
    heads, heads_of_keys = 4, 2 if name == "llama" else 4
    width = q.shape[-1] // heads
    scale = 1.0 if name == "t5" else width**-0.5
    bias = core.compute_bias(length, length)[0] if name == "t5" else torch.zeros(heads, length, length)
    rows = []
    for row in range(batch):
        parts = []
        for head in range(heads):
            mine = slice(head * width, (head + 1) * width)
            theirs = slice(head // (heads // heads_of_keys) * width, (head // (heads // heads_of_keys) + 1) * width)
            on_prefix = q[row, :, mine] @ prefix.keys[:, theirs].T * scale
            on_real = q[row, :, mine] @ k[row, :, theirs].T * scale + bias[head]
            on_real = on_real.masked_fill(~visible[row], float("-inf"))
            weights = torch.cat([on_prefix, on_real], dim=1).softmax(dim=1)
            parts.append(weights @ torch.cat([prefix.values[:, theirs], v[row, :, theirs]]))
        rows.append(torch.cat(parts, dim=1))
    y = torch.stack(rows)
    last = {"llama": "o_proj", "gpt2": "c_proj", "t5": "o", "vit": "o_proj"}.get(name)
    return getattr(core, last)(y) if last else y


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CORES)
def test_it_computes_the_papers_attention(name: str, implementation: str, masked: bool) -> None:
    model, adapter = prefixed_model(name)
    model.set_attn_implementation(implementation)
    core: Any = model.get_submodule(CORES[name])
    x = torch.randn(3, 6, 32)
    causal = name in ("llama", "gpt2", "t5") and (masked or implementation == "sdpa")  # eager knows only the mask
    visible = torch.ones(3, 6, 6, dtype=torch.bool)
    visible = visible.tril() if causal else visible
    mask = None
    if masked:
        visible[1, :, 4:] = False
        visible[1, 4:, 4:] = True  # not a row without keys
        mask = visible[:, None]
        if implementation == "eager":
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    delta: Any = adapter.sites[CORES[name]]
    with torch.no_grad():
        found = core(x, **asked_of(name, core, x, mask))[0]
        assert_near(found, by_equation(name, core, x, delta.prefix, visible), 2e-6)


@pytest.mark.parametrize("name", DECODERS)
def test_a_prefix_from_the_cache_of_real_tokens_is_those_tokens(name: str) -> None:
    base, (model, adapter) = make(name), prefixed_model(name, length=4)
    tokens = torch.randint(2, VOCABULARY, (1, 11))
    with torch.no_grad():
        cache = base(tokens[:, :4], use_cache=True).past_key_values
        for delta, layer in zip(adapter.sites.values(), cache.layers, strict=True):
            delta.prefix.keys.copy_(layer.keys[0].transpose(0, 1).reshape(4, -1))
            delta.prefix.values.copy_(layer.values[0].transpose(0, 1).reshape(4, -1))
        expected = base(tokens).logits[:, 4:]
        positions = torch.arange(4, 11)[None]  # a prefix of itself takes no positions
        assert_near(model(tokens[:, 4:], position_ids=positions).logits, expected, 2e-6)


# ---- padding, caches, generation


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2", "t5"])
def test_a_padded_batch_is_its_rows(name: str, side: str) -> None:
    model, _ = prefixed_model(name)
    single, batch = rows(), padded(rows(), side, token=1)
    extra: dict[str, Any] = {}
    if name == "t5":
        extra = {"decoder_input_ids": torch.tensor([[0, 5, 6]])}
    elif name != "roberta":  # which counts tokens without padding by itself
        extra = {"position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    backbone = model if name == "t5" else model.base_model  # a classifier of BERT takes position 0, be it padding
    with torch.no_grad():
        found = backbone(**batch, **{key: value.expand(3, -1) for key, value in extra.items()})[0]
        for place, row in enumerate(single):
            alone = backbone(row, **(extra if name == "t5" else {}))[0][0]
            real = batch["attention_mask"][place].bool()
            assert_near(found[place] if name == "t5" else found[place][real], alone, 2e-6)


@pytest.mark.parametrize("projected", [False, True], ids=["table", "network"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_with_a_cache_is_generation_without(name: str, cache: str, projected: bool) -> None:
    model, _ = prefixed_model(name, prefix_projection=projected)
    batch = padded(rows(), "right" if name == "t5" else "left")
    asked = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        cached = model.generate(**batch, **asked, cache_implementation=cache, disable_compile=True)
        plain = model.generate(**batch, **asked, use_cache=False)
        assert torch.equal(cached, plain)
        for row, expected in zip(rows(), plain, strict=True):
            alone = model.generate(row, attention_mask=torch.ones_like(row), **asked)[0]
            assert torch.equal(alone[-9:], expected[-9:])


def test_a_sliding_window_does_not_slide_past_the_prefix() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model: Any = MistralForCausalLM(
        MistralConfig(**sizes, num_key_value_heads=2, vocab_size=VOCABULARY, sliding_window=4)
    ).eval()
    adapter = attach(model, PrefixTuning(3))
    asked = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    row = rows()[0]
    cached = model.generate(row, **asked)
    assert torch.equal(cached, model.generate(row, **asked, use_cache=False))
    model(cached).logits[:, -1].sum().backward()  # the last token sees no real token before the last four
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.parameters().values())


@pytest.mark.parametrize("name", DECODERS)
def test_the_cache_holds_the_real_tokens_alone(name: str) -> None:
    model, _ = prefixed_model(name)
    assert model(rows()[0], use_cache=True).past_key_values.get_seq_length() == rows()[0].shape[1]


@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_the_users_length(name: str) -> None:
    model, inputs = make(name), inputs_for(name)
    model.set_attn_implementation("eager")
    expected = model(**inputs, output_attentions=True, output_hidden_states=True)
    attach(model, PrefixTuning(LENGTH))
    found = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert shapes(found) == shapes(expected)
    weights = found["encoder_attentions" if name == "t5" else "attentions"][0]
    assert float(weights.detach().sum(-1).max()) < 1  # the rest lies on the prefix


def shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.shape
    if isinstance(output, dict):
        return {key: shapes(value) for key, value in output.items()}
    return [shapes(value) for value in output] if isinstance(output, tuple) else None


# ---- gradients, copies, precision, compilation

OPTIONS: dict[str, dict[str, Any]] = {
    "table": {},
    "network": {"prefix_projection": True, "encoder_hidden_size": 12},
    "as peft": {"compat": "peft"},
    "network as peft": {"compat": "peft", "prefix_projection": True},
}
CASES = [(name, kind) for name in MODELS for kind in OPTIONS if not (name == "vit" and "peft" in kind)]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Adapter, dict[str, Tensor]]:
    name, kind = request.param
    return *prefixed_model(name, **OPTIONS[kind]), inputs_for(name)


Case = tuple[nn.Module, Adapter, dict[str, Tensor]]


def gradients(adapter: Adapter, inputs: Any) -> dict[str, Tensor]:
    adapter.model.zero_grad()
    loss_of(adapter.model, inputs).backward()
    assert all(p.grad is not None for p in adapter.parameters().values())
    return {key: p.grad.clone() for key, p in adapter.parameters().items() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(case: Case) -> None:
    model, adapter, inputs = case
    model.train()
    plain = gradients(adapter, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for key, gradient in gradients(adapter, inputs).items():
        assert share(gradient, plain[key]) < 1e-5, key


def test_eager_and_sdpa_agree(case: Case) -> None:
    model, adapter, inputs = case
    expected, plain = output(model, inputs), gradients(adapter, inputs)
    model.set_attn_implementation("eager")
    assert_near(output(model, inputs), expected, 2e-6)
    for key, gradient in gradients(adapter, inputs).items():
        assert share(gradient, plain[key]) < 1e-4, key


def test_gradients_are_those_of_finite_differences() -> None:
    model, adapter = prefixed_model("gpt2", length=2)
    model.double()
    inputs, step = inputs_for("gpt2"), 1e-5
    output(model, inputs).square().mean().backward()
    for parameter in adapter.parameters().values():
        values = parameter.data.view(-1)
        for place in (0, len(values) - 1):
            found = []
            for sign in (1, -1):
                values[place] += sign * step
                found.append(float(output(model, inputs).detach().square().mean()))
                values[place] -= sign * step
            assert parameter.grad is not None
            expected = float(parameter.grad.view(-1)[place])
            assert (found[0] - found[1]) / (2 * step) == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_copies_and_pickles_compute_the_same(case: Case) -> None:
    model, _, inputs = case
    expected = output(model, inputs)
    assert torch.equal(output(copy.deepcopy(model), inputs), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(model)), inputs), expected)


def test_taken_off_nothing_is_left(case: Case) -> None:
    model, adapter, inputs = case
    adapted = output(model, inputs)
    with adapter.disabled():
        base = output(model, inputs)
    adapter.remove()
    assert torch.equal(output(model, inputs), base)
    assert not torch.allclose(adapted, base, atol=1e-5)
    assert all(module.config is model.get_submodule(name).config for name, module in configured(model))
    assert not [key for key in model.state_dict() if "deltas" in key]


def configured(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if "config" in vars(module)]


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_it_compiles_without_a_graph_break(name: str) -> None:
    model, adapter = prefixed_model(name)
    inputs, configs = inputs_for(name), {name: module.config for name, module in configured(model)}
    expected, plain = output(model, inputs), gradients(adapter, inputs)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    model.zero_grad()
    found = compiled(**inputs)
    found.loss.backward()
    assert torch.equal(found.logits, expected)
    assert all(torch.equal(p.grad, plain[key]) for key, p in adapter.parameters().items() if p.grad is not None)
    assert all(module.config is configs[name] for name, module in configured(model))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_base_in_bfloat16(name: str) -> None:
    wide, _ = prefixed_model(name)
    model = make(name).bfloat16()
    torch.manual_seed(2)
    adapter = attach(model, PrefixTuning(LENGTH))
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}
    found = output(model, inputs_for(name))
    assert found.dtype == torch.bfloat16
    assert_near(found.float(), output(wide, inputs_for(name)), 3e-2)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(adapter, inputs_for(name)).values())


def test_an_error_within_the_attention_leaves_its_config() -> None:
    model, _ = prefixed_model("llama")
    inputs, core = inputs_for("llama"), model.get_submodule("model.layers.0.self_attn")
    expected, config = output(model, inputs), core.config

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("out of memory, say")

    core.o_proj.forward = fail
    with pytest.raises(RuntimeError, match="say"):
        model(**inputs)
    assert core.config is config
    del core.o_proj.forward
    assert torch.equal(output(model, inputs), expected)


def test_two_prefixes_stand_one_before_the_other() -> None:
    model, inputs = make("llama"), inputs_for("llama")
    torch.manual_seed(2)
    stacked = attach(model, Stack([PrefixTuning(2), PrefixTuning(3)]))
    expected = output(model, inputs)
    parts = list(stacked.parameters().values())
    keys, values = (
        [torch.cat([parts[place + 2], parts[place]]) for place in (0, 4)],
        [torch.cat([parts[place + 3], parts[place + 1]]) for place in (0, 4)],
    )
    stacked.remove()
    joined = attach(model, PrefixTuning(5))
    with torch.no_grad():
        for delta, key, value in zip(joined.sites.values(), keys, values, strict=True):
            delta.prefix.keys.copy_(key)
            delta.prefix.values.copy_(value)
    assert_near(output(model, inputs), expected, 2e-6)


# ---- what is saved


def test_files_hold_the_prefix_without_its_network(case: Case, tmp_path: Path) -> None:
    model, adapter, inputs = case
    stirred(adapter)
    save_adapter(adapter, tmp_path)
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "classifier" not in name]
    assert {name.rpartition(".")[2] for name in names} in ({"keys", "values"}, {"prompt_embeddings"})
    name = next(name for name in MODELS if type(make(name)) is type(model))
    fresh = make(name)
    loaded = load_adapter(fresh, tmp_path)
    assert_near(output(fresh, inputs), output(model, inputs), 1e-6)
    assert loaded.strategy.prefix_projection is False


def test_a_checkpoint_in_mid_training_holds_the_network() -> None:
    model, adapter = prefixed_model("llama", prefix_projection=True, encoder_hidden_size=12)
    stirred(adapter)
    state = {key: value.clone() for key, value in adapter.state().items()}
    assert sum(key.endswith("trunk.embedding") for key in state) == 1
    fresh = make("llama")
    attach(fresh, adapter.strategy).load_state(state)
    assert torch.equal(output(fresh, inputs_for("llama")), output(model, inputs_for("llama")))


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "at least 1 virtual token; num_virtual_tokens is 0"),
        ({"encoder_hidden_size": 8}, "without prefix_projection there is no network"),
        ({"encoder_hidden_size": 0, "prefix_projection": True}, "at least 1; got 0"),
        ({"compat": "opendelta"}, "compat is 'opendelta'; expected peft"),
    ],
)
def test_recipes_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PrefixTuning(**options)


TINY = {"hidden_size": 32, "vocab_size": 50}
DEEPSEEK: dict[str, Any] = {**TINY, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
UNSERVED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "computes its scores itself": (
        lambda: BloomModel(BloomConfig(**TINY, n_layer=1, n_head=4)),
        "'h.0.self_attention', a BloomAttention, takes no prefix.*Choose LoRA",
    ),
    "compressed keys": (
        lambda: DeepseekV3Model(DeepseekV3Config(**DEEPSEEK)),
        "DeepseekV3Model has none whose queries.*Choose LoRA",
    ),
    "torch's own": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32), 2, enable_nested_tensor=False),
        "nn.MultiheadAttention takes them from one weight.*Choose LoRA",
    ),
    "no attention": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "no stack of blocks.*Choose LoRA"),
}


@pytest.mark.parametrize("kind", UNSERVED)
def test_models_it_cannot_serve(kind: str) -> None:
    build, message = UNSERVED[kind]
    with pytest.raises(UserError, match=message):
        attach(build(), PrefixTuning())


def test_models_that_hf_peft_cannot_serve() -> None:
    with pytest.raises(UserError, match="ViTForImageClassification: HF PEFT puts the prefix into the cache"):
        attach(make("vit"), PrefixTuning(compat="peft"))
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "encoder_ffn_dim": 32}
    with pytest.raises(UserError, match="but T5; this is a BartModel"):
        attach(BartModel(BartConfig(**sizes)), PrefixTuning(compat="peft"))


@pytest.mark.parametrize(("name", "positions"), [("bert", 40), ("roberta", 38), ("gpt2", 40)])
def test_a_prefix_longer_than_the_positions_left(name: str, positions: int) -> None:
    with pytest.raises(UserError, match=f"has {positions} positions.*at most {positions - 1}"):
        attach(make(name), PrefixTuning(positions, compat="peft"))
    model, _ = prefixed_model(name, length=30, compat="peft")
    fits = positions - 30
    model(torch.full((1, fits), 7))
    with pytest.raises(UserError, match=f"A row of {fits + 1} tokens.*Cut the rows to {fits} tokens"):
        model(torch.full((1, fits + 1), 7))
    prefixed_model(name, length=50)[0](torch.full((1, positions), 7))  # by itself it takes none


def test_kinds_of_attention_it_cannot_serve() -> None:
    model, _ = prefixed_model("bert")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UserError, match="with 'flex_attention', whose mask takes no prefix"):
        attach(model, PrefixTuning(), "second")
    core = model.get_submodule(CORES["bert"])
    with pytest.raises(UserError, match="attn_implementation='sdpa'"):
        core(torch.randn(1, 3, 32))
    gpt2 = make("gpt2")
    gpt2.set_attn_implementation("eager")
    gpt2.transformer.h[0].attn.reorder_and_upcast_attn = True
    with pytest.raises(UserError, match="reorder_and_upcast_attn"):
        attach(gpt2, PrefixTuning())


def test_flash_attention_gets_ones_before_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel needs a GPU, so a function of the same form, with rows cut by the mask, stands in for it."""
    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_stand_in", flash_stand_in)
    model, _ = prefixed_model("bert")
    core = model.get_submodule(CORES["bert"])
    x, mask = torch.randn(2, 4, 32), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = core(x, attention_mask=mask[:, None, None].bool())[0]
    model.config._attn_implementation = "flash_stand_in"
    found = core(x, attention_mask=mask)[0]
    assert_near(found[0], expected[0])
    assert_near(found[1, :2], expected[1, :2])
    for extra in ({"sliding_window": 2}, {"cu_seq_lens_q": mask}):
        with pytest.raises(UserError, match=f"no prefix together with {next(iter(extra))}"):
            core(x, attention_mask=mask, **extra)
    with pytest.raises(UserError, match="rows packed by position_ids"):
        core(x[:1], position_ids=torch.tensor([[0, 1, 0, 1]]))


def flash_stand_in(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **options: Any
) -> tuple[Tensor, None]:
    found = torch.zeros_like(query)
    for row, mask in enumerate(attention_mask.bool()):
        asked = mask[-query.shape[2] :]
        weights = (query[row][:, asked] @ key[row][:, mask].transpose(1, 2) * scaling).softmax(-1)
        found[row][:, asked] = weights @ value[row][:, mask]
    return found.transpose(1, 2), None
