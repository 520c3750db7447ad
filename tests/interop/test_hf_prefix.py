"""Prefix tuning through files: ours read by HF PEFT, HF PEFT's read by us, and where positions make them equal."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from interop.exchange import FILES, HEADS, TASKS, changed, computed, config_in, quietly, stir
from models import VOCABULARY, inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import PrefixTuning
from strategies.against_peft import assert_near, loss_of

pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = 5
TENSORS = "adapter_model.safetensors"
EQUAL = ["llama", "llama_classifier"]
"""Where HF PEFT has the numbers of our own conventions."""
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                         "intermediate_size": 64, "vocab_size": VOCABULARY, "head_dim": 8,
                         "pad_token_id": 0}  # fmt: skip


def trained(name: str, **fields: Any) -> tuple[nn.Module, Adapter]:
    """The untouched base, and an adapter after a step of training."""
    base = make(name)
    torch.manual_seed(3)
    strategy = PrefixTuning(COUNT, **fields)
    adapter = attach(copy.deepcopy(base), strategy, modules_to_train=HEADS.get(name, []))
    optimizer = torch.optim.SGD(adapter.parameters().values(), lr=0.1)
    loss_of(adapter.model, inputs_for(name)).backward()
    optimizer.step()
    stir(adapter.parameters().values())
    return base, adapter


def theirs_in(folder: Path, base: nn.Module, name: str, **fields: Any) -> PeftModel:
    """HF PEFT's model with a prefix that is saved in the folder."""
    config = PrefixTuningConfig(task_type=TASKS[name], num_virtual_tokens=COUNT, **fields)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    stir(p for key, p in model.named_parameters() if p.requires_grad and "original_module" not in key)
    model.save_pretrained(folder)
    return model


# ---- HF PEFT's files


@pytest.mark.parametrize("projected", [False, True], ids=["table", "network"])
@pytest.mark.parametrize("name", TASKS)
def test_we_read_what_peft_writes(name: str, projected: bool, tmp_path: Path) -> None:
    base = make(name)
    theirs = theirs_in(tmp_path / "theirs", base, name, prefix_projection=projected)
    adapter = load_adapter(base, tmp_path / "theirs")
    assert adapter.strategy == PrefixTuning(COUNT, compat="peft")
    assert_near(computed(base, inputs_for(name)), computed(theirs, inputs_for(name)))
    save_adapter(adapter, tmp_path / "ours")
    mine, others = (load_file(tmp_path / folder / TENSORS) for folder in ("ours", "theirs"))
    assert mine.keys() == others.keys()
    for key, value in mine.items():
        # Of T5's two places for two layers HF PEFT reads the first alone; for the other we write zeros.
        read = value.shape[1] // 2 if name == "t5" else None
        assert torch.equal(value[..., :read], others[key][..., :read])


def test_an_odd_number_of_layers_in_t5(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    config = transformers.T5Config(**sizes, num_layers=3, dropout_rate=0.0, decoder_start_token_id=0)
    base = transformers.T5ForConditionalGeneration(config).eval()
    theirs = theirs_in(tmp_path / "theirs", base, "t5")
    adapter = load_adapter(base, tmp_path / "theirs")
    assert_near(computed(base, inputs_for("t5")), computed(theirs, inputs_for("t5")))
    save_adapter(adapter, tmp_path / "ours")
    mine, others = (load_file(tmp_path / folder / TENSORS)["prompt_embeddings"] for folder in ("ours", "theirs"))
    assert torch.equal(mine, others)


# ---- ours


@pytest.mark.parametrize("projected", [False, True], ids=["table", "network"])
@pytest.mark.parametrize(("name", "compat"), [("vit", None), *((n, c) for n in TASKS for c in (None, "peft"))])
def test_we_read_what_we_write_and_so_does_peft_where_it_can(
    name: str, compat: Any, projected: bool, tmp_path: Path
) -> None:
    base, adapter = trained(name, compat=compat, prefix_projection=projected)
    expected = computed(adapter.model, inputs_for(name))
    save_adapter(adapter, tmp_path / "one")
    again = load_adapter(copy.deepcopy(base), tmp_path / "one", "other")
    assert torch.equal(computed(again.model, inputs_for(name)), expected) or projected  # whose network is left out
    assert_near(computed(again.model, inputs_for(name)), expected)
    assert again.strategy == PrefixTuning(COUNT, compat=compat)
    save_adapter(again, tmp_path / "two")
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    if compat or name in EQUAL:
        assert config_in(tmp_path / "one")["peft_type"] == "PREFIX_TUNING"
        assert_near(computed(quietly(base, tmp_path / "one"), inputs_for(name)), expected)
    else:
        assert config_in(tmp_path / "one")["peft_type"] == "PEFTLIGHT_PREFIXTUNING"


ANGLES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
}
KINDS: dict[str, dict[str, Any]] = {
    **{kind: {} for kind in ("Llama", "Mixtral", "Qwen2", "Qwen3", "Qwen3Moe", "Gemma", "Olmo", "Olmo2", "Granite")},
    "Mistral": {"sliding_window": None},
    "Phi3": {"eos_token_id": 1, "bos_token_id": 1},
}


def decoder(kind: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **fields})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def assert_equal_in_hf_peft(base: nn.Module, folder: Path) -> None:
    """The same logits on rows with padding on the left, longer than the positions that angles are scaled from."""
    adapter = attach(copy.deepcopy(base), PrefixTuning(COUNT))
    save_adapter(adapter, folder)
    assert config_in(folder)["peft_type"] == "PREFIX_TUNING"
    tokens, mask = torch.randint(2, VOCABULARY, (2, 30)), torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = adapter.model(input_ids=tokens, attention_mask=mask).logits[mask.bool()]
        theirs = quietly(copy.deepcopy(base), folder)(input_ids=tokens, attention_mask=mask).logits
        assert_near(theirs[mask.bool()], expected)
        ours = load_adapter(base, folder).model(input_ids=tokens, attention_mask=mask).logits
        assert torch.equal(ours[mask.bool()], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_models_whose_positions_turn_keys_are_written_for_hf_peft(kind: str, tmp_path: Path) -> None:
    assert_equal_in_hf_peft(decoder(kind, **KINDS[kind]), tmp_path)


@pytest.mark.parametrize("angles", ANGLES)
def test_so_they_are_with_scaled_angles(angles: str, tmp_path: Path) -> None:
    parameters = {"rope_type": angles, "rope_theta": 10000.0, **ANGLES[angles]}
    assert_equal_in_hf_peft(decoder("Llama", rope_parameters=parameters, max_position_embeddings=64), tmp_path)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Mistral", {"sliding_window": 8}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
        ("Phi3", {"eos_token_id": 1, "bos_token_id": 1,
                  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("StableLm", {}),
    ],
)  # fmt: skip
def test_others_keep_our_format(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """A window, angles that change with the row's length, only some features that turn, a model that is not known."""
    base = decoder(kind, **fields)
    adapter = attach(copy.deepcopy(base), PrefixTuning(COUNT))
    save_adapter(adapter, tmp_path)
    assert config_in(tmp_path)["peft_type"] == "PEFTLIGHT_PREFIXTUNING"
    tokens = torch.randint(2, VOCABULARY, (2, 30))
    with torch.no_grad():
        assert torch.equal(load_adapter(base, tmp_path).model(tokens).logits, adapter.model(tokens).logits)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_keys_turned_for_hf_peft_come_back_with_the_same_bits(precision: torch.dtype, tmp_path: Path) -> None:
    base = make("llama").to(precision)
    adapter = attach(copy.deepcopy(base), PrefixTuning(COUNT))
    save_adapter(adapter, tmp_path)
    again, state = load_adapter(base, tmp_path).state(), adapter.state()
    assert all(torch.equal(value, again[key]) and value.dtype == again[key].dtype for key, value in state.items())


@pytest.mark.parametrize("name", EQUAL)
def test_without_our_record_the_files_are_hf_pefts(name: str, tmp_path: Path) -> None:
    base, adapter = trained(name)
    save_adapter(adapter, tmp_path)
    (tmp_path / "peftlight.json").unlink()
    assert load_adapter(base, tmp_path, "other").strategy == PrefixTuning(COUNT, compat="peft")
    assert_near(computed(base, inputs_for(name)), computed(adapter.model, inputs_for(name)))


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"class_path": "LoRA", "init_args": {}}, "The record is of LoRA"),
        ({"class_path": "PrefixTuning", "init_args": {"num_virtual_tokens": 4}}, "but the files hold PrefixTuning"),
        ({"class_path": "PrefixTuning", "init_args": {"num_virtual_tokens": COUNT}}, "has no equal in HF PEFT's files"),
    ],
)
def test_a_record_of_another_adapter_is_refused(strategy: Any, message: str, tmp_path: Path) -> None:
    base, adapter = trained("gpt2", compat="peft")
    save_adapter(adapter, tmp_path)
    file = tmp_path / "peftlight.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "strategy": strategy}))
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)


def test_saving_and_loading_leave_random_numbers_as_they_are(tmp_path: Path) -> None:
    base, adapter = trained("t5", compat="peft")
    state = torch.get_rng_state()
    save_adapter(adapter, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    load_adapter(base, tmp_path)


def test_the_config(tmp_path: Path) -> None:
    base = make("llama_classifier")
    base.config.name_or_path = "some/llama"
    save_adapter(attach(base, PrefixTuning(COUNT), modules_to_train=["score"]), tmp_path)
    assert config_in(tmp_path) == {
        "peft_type": "PREFIX_TUNING", "peft_version": "0.21.2", "task_type": "SEQ_CLS", "inference_mode": True,
        "base_model_name_or_path": "some/llama", "modules_to_save": ["score"], "num_virtual_tokens": COUNT,
        "token_dim": 16, "num_transformer_submodules": 1, "num_layers": 2, "num_attention_heads": 2,
    }  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in load_file(tmp_path / TENSORS).items()}
    assert shapes == {"prompt_embeddings": (COUNT, 64), "base_model.score.weight": (3, 32)}


# ---- bad input


CASES: list[tuple[dict[str, Any], dict[str, Tensor | None], str]] = [
    ({"task_type": None}, {}, "task_type is missing, and HF PEFT would load .* without its prompt"),
    ({"task_type": "CAUSAL_LM"}, {}, "task_type is 'CAUSAL_LM'; for this .* it is 'SEQ_CLS'"),
    ({"num_virtual_tokens": 6}, {}, "prompt_embeddings has 5 rows; 6 virtual tokens need 6"),
    ({"num_virtual_tokens": 0}, {"prompt_embeddings": torch.ones(0, 128)}, "at least 1 virtual token"),
    ({"num_virtual_tokens": 40}, {"prompt_embeddings": torch.ones(40, 128)}, "the model has 40 positions"),
    ({"num_layers": 3}, {}, "num_layers is 3; for this model it is 2"),
    ({"num_attention_heads": 8}, {}, "num_attention_heads is 8; for this model it is 4"),
    ({"num_attention_heads": "4"}, {}, "num_attention_heads is '4'; expected int"),
    ({"token_dim": 16}, {}, "token_dim is 16; for this model it is 32"),
    ({"num_transformer_submodules": 2}, {}, "num_transformer_submodules is 2; for this model it is 1"),
    ({"prefix_projection": "yes"}, {}, "prefix_projection is 'yes'; expected bool"),
    ({"num_frozen_tokens": 1}, {}, "not supported here: num_frozen_tokens=1"),
    ({}, {"prompt_embeddings": None}, "needs a tensor 'prompt_embeddings' .* it has none"),
    ({}, {"prompt_embeddings": torch.ones(5, 2, 64)}, r"shape \(5, 2, 64\)"),
    ({}, {"prompt_embeddings": torch.ones(5, 64)}, "has 64 columns; keys and values of 2 layers with 32 each need 128"),
    ({}, {"base_model.classifier.bias": None}, "missing: classifier.bias"),
    ({}, {"base_model.model.classifier.bias": torch.ones(3)}, "unexpected: base_model.model.classifier.bias"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_files_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, adapter = trained("bert", compat="peft")
    save_adapter(adapter, tmp_path)
    changed(tmp_path, config, tensors)
    before = computed(base, inputs_for("bert"))
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert torch.equal(computed(base, inputs_for("bert")), before)
    assert not any("deltas" in key for key in base.state_dict())


def test_a_model_with_a_window_is_refused(tmp_path: Path) -> None:
    """HF PEFT's prefix slides out of it, so ours would compute something else once rows are longer."""
    base = decoder("Mistral", sliding_window=8)
    theirs_in(tmp_path, base, "llama")
    with pytest.raises(UserError, match="out of which HF PEFT's prefix slides"):
        load_adapter(base, tmp_path)
    with pytest.raises(UserError, match="out of which HF PEFT's prefix slides"):
        attach(base, PrefixTuning(COUNT, compat="peft"))


def test_a_decoder_of_another_depth_than_its_encoder_keeps_our_format(tmp_path: Path) -> None:
    """HF PEFT counts the encoder's layers."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4}
    config = transformers.T5Config(**sizes, num_layers=2, num_decoder_layers=3, decoder_start_token_id=0)
    base = transformers.T5ForConditionalGeneration(config).eval()
    theirs_in(tmp_path / "theirs", base, "t5")
    with pytest.raises(UserError, match="it makes one for each of num_hidden_layers, and 3 layers take one"):
        load_adapter(base, tmp_path / "theirs")
    save_adapter(attach(base, PrefixTuning(COUNT, compat="peft")), tmp_path / "ours")
    assert config_in(tmp_path / "ours")["peft_type"] == "PEFTLIGHT_PREFIXTUNING"


def test_a_model_without_a_cache_is_refused(tmp_path: Path) -> None:
    _, adapter = trained("bert", compat="peft")
    save_adapter(adapter, tmp_path)
    with pytest.raises(UserError, match="HF PEFT has no prompt learning for a ViTForImageClassification"):
        load_adapter(make("vit"), tmp_path)
