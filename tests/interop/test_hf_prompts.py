"""Prompt tuning and P-tuning through files: ours read by HF PEFT, HF PEFT's read by us, and by which conventions."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaModel

from interop.exchange import FILES, HEADS, TASKS, changed, config_in, quietly, stir
from models import inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import PromptTuning, PTuning
from strategies.against_peft import assert_near, loss_of

pytestmark = pytest.mark.filterwarnings("ignore")

COUNT = 5
TENSORS = "adapter_model.safetensors"
OURS = {"prompt": PromptTuning, "p": PTuning}
THEIRS = {"prompt": PromptTuningConfig, "p": PromptEncoderConfig}
EQUAL = ["llama", "gpt2", "t5"]
"""Where HF PEFT has the numbers of our own conventions."""


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    """Of a model that predicts tokens, those after the real ones, without virtual tokens and padding."""
    inputs = inputs_for(name)
    found: Tensor = model(**inputs).logits
    if name in ("llama", "gpt2"):
        return found[:, -inputs["labels"].shape[1] :][inputs["attention_mask"].bool()]
    return found


def trained(name: str, kind: str, **fields: Any) -> tuple[nn.Module, Adapter]:
    """The untouched base, and an adapter after a step of training."""
    base = make(name)
    torch.manual_seed(3)
    heads = HEADS.get(name, [])
    adapter = attach(copy.deepcopy(base), OURS[kind](COUNT, **fields), modules_to_train=heads)
    optimizer = torch.optim.SGD(adapter.parameters().values(), lr=0.1)
    loss_of(adapter.model, inputs_for(name)).backward()
    optimizer.step()
    stir(adapter.parameters().values())
    return base, adapter


# ---- HF PEFT's files


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", TASKS)
def test_we_read_what_peft_writes(name: str, kind: str, tmp_path: Path) -> None:
    base = make(name)
    theirs = get_peft_model(copy.deepcopy(base), THEIRS[kind](task_type=TASKS[name], num_virtual_tokens=COUNT)).eval()
    stir(p for key, p in theirs.named_parameters() if p.requires_grad and "original_module" not in key)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(base, tmp_path / "theirs")
    assert adapter.strategy == PromptTuning(COUNT, init="random", compat="peft")
    assert_near(logits(base, name), logits(theirs, name))
    save_adapter(adapter, tmp_path / "ours")
    mine, others = (load_file(tmp_path / folder / TENSORS) for folder in ("ours", "theirs"))
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[key], others[key]) for key in mine)


def test_left_padding_gets_hf_pefts_numbers_too(tmp_path: Path) -> None:
    """There HF PEFT puts the virtual tokens before the padding; by our conventions they stand behind it."""
    base = make("llama")
    theirs = get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT))
    theirs.eval().save_pretrained(tmp_path)
    load_adapter(base, tmp_path)
    tokens, mask = inputs_for("llama")["input_ids"], torch.ones(4, 7, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = theirs(input_ids=tokens, attention_mask=mask).logits
        assert_near(base(input_ids=tokens, attention_mask=mask).logits, expected)


def test_a_head_by_the_name_that_transformers_4_gave_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    base = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, vocab_size=100)).eval()
    adapter = attach(copy.deepcopy(base), PromptTuning(COUNT, compat="peft"), modules_to_train=["lm_head"])
    stir(adapter.parameters().values())
    save_adapter(adapter, tmp_path)
    head = "base_model.lm_head.weight"
    older = {head: None, "base_model.embed_out.weight": load_file(tmp_path / TENSORS)[head]}
    changed(tmp_path, {"modules_to_save": ["embed_out"]}, older)
    assert load_adapter(base, tmp_path).trained == ["lm_head"]
    assert torch.equal(logits(base, "gpt2"), logits(adapter.model, "gpt2"))


@torch.no_grad()
@pytest.mark.parametrize("kind", [BertModel, LlamaModel])
def test_models_without_a_head(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = (BertConfig if kind is BertModel else LlamaConfig)(**sizes, vocab_size=100)
    base, tokens = kind(config).eval(), inputs_for("bert")["input_ids"]
    theirs = get_peft_model(
        copy.deepcopy(base), PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=COUNT)
    ).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(copy.deepcopy(base), tmp_path / "theirs")
    expected = theirs(tokens).last_hidden_state
    assert_near(adapter.model(tokens).last_hidden_state[:, -7:], expected[:, -7:])
    save_adapter(adapter, tmp_path / "ours")
    assert_near(quietly(copy.deepcopy(base), tmp_path / "ours")(tokens).last_hidden_state, expected)
    # By our conventions a BERT pools the first real token, which HF PEFT does not.
    save_adapter(attach(base, PromptTuning(COUNT)), tmp_path / "own")
    assert config_in(tmp_path / "own")["peft_type"].startswith("PEFTLIGHT") == (kind is BertModel)


# ---- ours


@pytest.mark.parametrize("compat", [None, "peft"])
@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", TASKS)
def test_we_read_what_we_write_and_so_does_peft_where_it_can(name: str, kind: str, compat: Any, tmp_path: Path) -> None:
    base, adapter = trained(name, kind, compat=compat)
    expected = logits(adapter.model, name)
    save_adapter(adapter, tmp_path / "one")
    again = load_adapter(copy.deepcopy(base), tmp_path / "one")
    assert_near(logits(again.model, name), expected)
    assert again.strategy == adapter.strategy.finished(adapter)
    assert again.model(**inputs_for(name)).logits.shape == adapter.model(**inputs_for(name)).logits.shape
    save_adapter(again, tmp_path / "two")
    for file in FILES:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    if compat or name in EQUAL:
        assert config_in(tmp_path / "one")["peft_type"] == "PROMPT_TUNING"
        assert_near(logits(quietly(base, tmp_path / "one"), name), expected)
    else:
        assert config_in(tmp_path / "one")["peft_type"] == "PEFTLIGHT_PROMPTTUNING"


@pytest.mark.parametrize("name", EQUAL)
def test_without_our_record_the_files_are_hf_pefts(name: str, tmp_path: Path) -> None:
    base, adapter = trained(name, "prompt")
    expected = logits(adapter.model, name)
    save_adapter(adapter, tmp_path)
    (tmp_path / "peftlight.json").unlink()
    again = load_adapter(base, tmp_path, "other")
    assert again.strategy == PromptTuning(COUNT, init="random", compat="peft")
    assert_near(logits(base, name), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "kind",
    [
        "BertForTokenClassification",
        "BertForQuestionAnswering",
        "RobertaForTokenClassification",
        "LlamaForTokenClassification",
        "LlamaModel",
    ],
)
def test_models_with_an_output_for_each_token_have_hf_pefts(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = getattr(transformers, f"{kind.partition('For')[0].removesuffix('Model')}Config")
    base = getattr(transformers, kind)(config(**sizes, vocab_size=100)).eval()
    heads = [name for name, _ in base.named_children() if name in ("classifier", "qa_outputs", "score")]
    adapter = attach(copy.deepcopy(base), PromptTuning(COUNT), modules_to_train=heads)
    stir(adapter.parameters().values())
    save_adapter(adapter, tmp_path)
    inputs = {key: value for key, value in inputs_for("bert").items() if key != "labels"}
    real, expected = inputs["attention_mask"].bool(), adapter.model(**inputs)[0]
    theirs = quietly(copy.deepcopy(base), tmp_path)(**inputs)[0]
    assert theirs.shape[1] == expected.shape[1] + COUNT
    assert_near(theirs[:, COUNT:][real], expected[real])
    assert torch.equal(load_adapter(base, tmp_path).model(**inputs)[0], expected)


def test_a_head_that_is_not_trained_is_in_the_file_and_stays_so(tmp_path: Path) -> None:
    base = make("bert")
    adapter = attach(copy.deepcopy(base), PromptTuning(COUNT, compat="peft"))
    save_adapter(adapter, tmp_path)
    assert "base_model.classifier.weight" in load_file(tmp_path / TENSORS)
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert again.parameters().keys() == adapter.parameters().keys()
    assert_near(logits(quietly(base, tmp_path), "bert"), logits(adapter.model, "bert"))


@pytest.mark.parametrize(("name", "module"), [("llama", "embed_tokens"), ("gpt2", "lm_head")])
def test_trained_embeddings_of_tokens_keep_it_in_our_format(name: str, module: str, tmp_path: Path) -> None:
    """HF PEFT takes the embeddings past the trained copy."""
    base = make(name)
    adapter = attach(copy.deepcopy(base), PromptTuning(COUNT), modules_to_train=[module])
    stir(adapter.parameters().values())
    save_adapter(adapter, tmp_path)
    assert config_in(tmp_path)["peft_type"] == "PEFTLIGHT_PROMPTTUNING"
    assert torch.equal(logits(load_adapter(base, tmp_path).model, name), logits(adapter.model, name))


def test_the_config(tmp_path: Path) -> None:
    base = make("t5")
    base.config.name_or_path = "some/t5"
    save_adapter(attach(base, PromptTuning(COUNT)), tmp_path)
    assert config_in(tmp_path) == {
        "peft_type": "PROMPT_TUNING", "peft_version": "0.21.2", "task_type": "SEQ_2_SEQ_LM", "inference_mode": True,
        "base_model_name_or_path": "some/t5", "modules_to_save": None, "num_virtual_tokens": COUNT, "token_dim": 32,
        "num_transformer_submodules": 2, "num_layers": 2, "num_attention_heads": 4, "prompt_tuning_init": "RANDOM",
    }  # fmt: skip
    table = load_file(tmp_path / TENSORS)["prompt_embeddings"]
    assert table.shape == (2 * COUNT, 32)
    assert not table[COUNT:].any()


# ---- bad input


CASES: list[tuple[dict[str, Any], dict[str, Tensor | None], str]] = [
    ({"task_type": None}, {}, "task_type is missing, and HF PEFT would load .* without its prompt. Set it to 'SEQ"),
    ({"task_type": "SEQ_CLASS"}, {}, "task_type is 'SEQ_CLASS'; for this .* 'SEQ_CLS'. Did you mean 'SEQ_CLS'"),
    ({"task_type": ["SEQ_CLS"]}, {}, "task_type is .*; expected str"),
    ({"num_virtual_tokens": None}, {}, "num_virtual_tokens is missing"),
    ({"num_virtual_tokens": "5"}, {}, "num_virtual_tokens is '5'; expected int"),
    ({"num_virtual_tokens": True}, {}, "num_virtual_tokens is True; expected int"),
    ({"num_virtual_tokens": 10**12}, {}, "prompt_embeddings has 5 rows; 1000000000000 virtual tokens need"),
    ({"num_virtual_tokens": 0}, {}, "prompt_embeddings has 5 rows; 0 virtual tokens need 0"),
    ({"num_virtual_tokens": 0}, {"prompt_embeddings": torch.ones(0, 32)}, "needs at least one virtual token"),
    ({"num_virtual_tokens": 40}, {"prompt_embeddings": torch.ones(40, 32)}, "the model has 40 positions"),
    ({"num_transformer_submodules": 2}, {}, "num_transformer_submodules is 2; for this model it is 1"),
    ({"token_dim": 64}, {}, "token_dim is 64; for this model it is 32"),
    ({"prompt_tuning_init_state_dict_path": "x"}, {}, "not supported here: prompt_tuning_init_state_dict_path='x'"),
    ({"tokenizer_kwargs": "fast"}, {}, "tokenizer_kwargs is 'fast'; expected dict"),
    ({"modules_to_save": ["classifier", 3]}, {}, "modules_to_save is .*; expected list"),
    ({"modules_to_save": ["scorer"]}, {}, "modules_to_save lists scorer, which this"),
    ({"modules_to_save": ["classifier", "word_embeddings"]}, {}, "missing: bert.embeddings.word_embeddings.weight"),
    ({}, {"prompt_embeddings": None}, "needs a tensor 'prompt_embeddings' .* it has none"),
    ({}, {"prompt_embeddings": torch.ones(160)}, r"it has one of shape \(160,\)"),
    ({}, {"prompt_embeddings": torch.ones(5, 32, dtype=torch.int32)}, "torch.int32"),
    ({}, {"prompt_embeddings": torch.ones(6, 32)}, "prompt_embeddings has 6 rows; 5 virtual tokens need 5"),
    ({}, {"prompt_embeddings": torch.ones(5, 31)}, "prompt_embeddings has 31 columns; the model's embeddings have 32"),
    ({}, {"base_model.classifier.bias": None}, "missing: classifier.bias"),
    ({"modules_to_save": None}, {f"base_model.classifier.{end}": None for end in ("weight", "bias")},
     "missing: classifier.(weight|bias)"),
    ({}, {"base_model.classifier.bias": torch.ones(7)}, r"classifier.bias has shape \(7,\); in the model \(3,\)"),
    ({}, {"base_model.nowhere.bias": torch.ones(7)}, "unexpected: base_model.nowhere.bias"),
    ({}, {"base_model.bert.pooler.dense.bias": torch.ones(32)}, "bert.pooler.dense.bias differs from the base"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "message"), CASES, ids=[case[2][:40] for case in CASES])
def test_bad_files_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, adapter = trained("bert", "prompt", compat="peft")
    save_adapter(adapter, tmp_path)
    changed(tmp_path, config, tensors)
    before = logits(base, "bert")
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert torch.equal(logits(base, "bert"), before)
    assert not any("deltas" in key for key in base.state_dict())


def test_every_problem_is_listed_at_once(tmp_path: Path) -> None:
    base, adapter = trained("bert", "prompt", compat="peft")
    save_adapter(adapter, tmp_path)
    odd = {"base_model.x": torch.ones(1), "base_model.classifier.bias": None, "prompt_embeddings": torch.ones(5, 3)}
    changed(tmp_path, {"num_transformer_submodules": 2}, odd)
    with pytest.raises(UserError) as raised:
        load_adapter(base, tmp_path)
    for part in ("unexpected: base_model.x", "missing: classifier.bias", "has 3 columns", "submodules is 2"):
        assert str(raised.value).count(part) == 1


def test_files_for_another_model_are_refused(tmp_path: Path) -> None:
    _, adapter = trained("llama", "prompt")
    save_adapter(adapter, tmp_path)
    changed(tmp_path, {}, {})
    with pytest.raises(UserError, match=r"task_type is 'CAUSAL_LM'; for this BertFor.* it is 'SEQ_CLS'"):
        load_adapter(make("bert"), tmp_path)
    with pytest.raises(UserError, match="HF PEFT has no prompt learning for a ViTForImageClassification"):
        load_adapter(make("vit"), tmp_path)


def test_trained_embeddings_that_hf_peft_does_not_use_are_refused(tmp_path: Path) -> None:
    base = make("llama")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=COUNT, modules_to_save=["embed_tokens"])
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="modules_to_save has the input embeddings"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        ({"class_path": "LoRA", "init_args": {}}, "The record is of LoRA"),
        ({"class_path": "PromptTuning", "init_args": {"num_virtual_tokens": 4}}, "but the files hold PromptTuning"),
        ({"class_path": "PromptTuning"}, "expected an object with class_path"),
        ({"class_path": "PromptTuning", "init_args": {"compat": "hf"}}, "compat is 'hf'"),
    ],
)
def test_a_record_of_another_adapter_is_refused(strategy: Any, message: str, tmp_path: Path) -> None:
    base, adapter = trained("llama", "prompt")
    save_adapter(adapter, tmp_path)
    file = tmp_path / "peftlight.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "strategy": strategy}))
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
