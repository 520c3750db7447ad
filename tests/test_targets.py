"""Selection of modules, with HF PEFT as the oracle for what its rules select."""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from peftlight.errors import UserError
from peftlight.targets import Selection, check_patterns, matching, pattern_value, select

peft = pytest.importorskip("peft")
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
}  # fmt: skip


def bert() -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL))


def roberta() -> nn.Module:
    return hf.RobertaForSequenceClassification(hf.RobertaConfig(**SMALL))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=40, n_embd=16, n_layer=4, n_head=2))


def t5() -> nn.Module:
    config = hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_decoder_layers=2, num_heads=2)
    return hf.T5ForConditionalGeneration(config)


def vit() -> nn.Module:
    sizes = {name: size for name, size in SMALL.items() if name != "vocab_size"}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4))


def llama_classifier() -> nn.Module:
    return hf.LlamaForSequenceClassification(hf.LlamaConfig(**SMALL, pad_token_id=0))


MODELS = {make.__name__: make for make in (bert, roberta, llama, gpt2, t5, vit, llama_classifier)}
TASKS = {
    "bert": "SEQ_CLS", "roberta": "SEQ_CLS", "llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM",
    "vit": "SEQ_CLS", "llama_classifier": "SEQ_CLS",
}  # fmt: skip
HEADS = ("classifier", "score")


def wrapped(model: nn.Module, name: str, **config: Any) -> dict[str, Any]:
    """The modules that HF PEFT gives a LoRA, by their path in the model, with their rank."""
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(task_type=TASKS[name], **config))
    return {
        path.removeprefix("base_model.model."): module.r["default"]  # type: ignore[attr-defined]
        for path, module in adapted.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def ours(model: nn.Module, target: str | list[str] | None, **options: Any) -> Selection:
    heads = [name for name, _ in model.named_children() if name in HEADS]
    return select(model, target, KINDS, skip=heads, **options)


def rename(model: nn.Module, model_type: str) -> None:
    vars(model)["config"] = SimpleNamespace(model_type=model_type)


def error(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama", "gpt2", "t5"])
def test_default_selects_what_peft_selects(name: str) -> None:
    model = MODELS[name]()
    selection = ours(model, None)
    assert set(selection.modules) == set(wrapped(model, name))
    assert selection.notice is None


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_selects_what_peft_selects(name: str) -> None:
    model = MODELS[name]()
    expected = set(wrapped(model, name, target_modules="all-linear"))
    assert set(ours(model, "all-linear").modules) == expected
    assert set(select(model, "all-linear", KINDS).modules) == expected


SELECTIONS = [
    ("bert", ["query", "output.dense"]),
    ("bert", ["dense"]),
    ("bert", ["bert.encoder.layer.1.attention.self.key", "word_embeddings"]),
    ("bert", r".*\.layer\.[02]\..*(query|value)"),
    ("roberta", ["dense", "key"]),
    ("llama", ["q_proj", "down_proj", "embed_tokens"]),
    ("llama", r"model\.layers\.\d+\.mlp\.(up|gate)_proj"),
    ("gpt2", ["attn.c_proj", "c_fc"]),
    ("t5", ["SelfAttention.q", "wo", "shared"]),
    ("t5", r"decoder\..*EncDecAttention\.[kv]"),
    ("vit", ["q_proj", "projection"]),
]


@pytest.mark.parametrize(("name", "target"), SELECTIONS)
def test_names_and_patterns_select_what_peft_selects(name: str, target: str | list[str]) -> None:
    model = MODELS[name]()
    assert set(ours(model, target).modules) == set(wrapped(model, name, target_modules=target))


@pytest.mark.parametrize(("name", "exclude"), [("bert", ["key", "intermediate.dense"]), ("t5", ["wo"])])
def test_exclude_modules_as_in_peft(name: str, exclude: list[str]) -> None:
    model = MODELS[name]()
    expected = wrapped(model, name, target_modules="all-linear", exclude_modules=exclude)
    assert set(ours(model, "all-linear", exclude_modules=exclude).modules) == set(expected)


LAYERS: list[tuple[str, str | list[int], list[int]]] = [
    ("bert", "last 3", [1, 2, 3]),
    ("bert", "first 2", [0, 1]),
    ("llama", "1-2", [1, 2]),
    ("llama", "2", [2]),
    ("gpt2", [0, -1], [0, 3]),
    ("t5", "0-1", [0, 1]),
    ("vit", [3], [3]),
]


@pytest.mark.parametrize(("name", "layers", "indices"), LAYERS)
def test_layers_are_pefts_layers_to_transform(name: str, layers: str | list[int], indices: list[int]) -> None:
    model = MODELS[name]()
    names = [name.split(".")[-1] for name in ours(model, "attention").modules]
    targets = sorted(set(names))
    expected = wrapped(model, name, target_modules=targets, layers_to_transform=indices)
    assert set(ours(model, targets, layers=layers).modules) == set(expected)


@pytest.mark.parametrize("patterns", [{"query": 4}, {r"layer\.1\.attention\.self\.query": 2, "query": 4, "alue": 5}])
def test_pattern_value_is_pefts_rank(patterns: dict[str, int]) -> None:
    model = bert()
    ranks = wrapped(model, "bert", rank_pattern=patterns, r=8)
    assert {name: pattern_value(patterns, name, 8) for name in ours(model, None).modules} == ranks


def test_selection_is_in_the_order_of_the_model_and_counts_each_name() -> None:
    model = bert()
    selection = ours(model, ["value", "query"])
    assert list(selection.modules) == [n for n, _ in model.named_modules() if n.endswith(("query", "value"))]
    assert all(model.get_submodule(name) is module for name, module in selection.modules.items())
    assert selection.matched == {"value": 4, "query": 4}
    assert ours(model, ["value", "pooler.dense"], layers="last 1").matched == {"value": 1, "pooler.dense": 0}


def test_a_plain_string_is_one_name_and_a_path_too() -> None:
    model = bert()
    assert ours(model, "self.query").matched == {"self.query": 4}
    assert list(ours(model, "bert.pooler.dense").modules) == ["bert.pooler.dense"]


PRESETS = [
    ("bert", 4 * 4, 4 * 6),
    ("llama", 4 * 4, 4 * 7),
    ("gpt2", 4 * 2, 4 * 4),
    ("t5", 3 * 4 + 2 * 8, 3 * 6 + 2 * 10),
    ("vit", 4 * 4, 4 * 6),
]


@pytest.mark.parametrize(("name", "attention", "both"), PRESETS)
@pytest.mark.parametrize("known", [True, False])
def test_presets_by_table_and_by_structure_agree(name: str, attention: int, both: int, known: bool) -> None:
    model = MODELS[name]()
    if not known:
        rename(model, "novel")
    for preset, count in (("attention", attention), ("attention+mlp", both)):
        selection = select(model, preset, KINDS)
        assert len(selection.modules) == count
        assert (selection.notice is None) == known
    assert not any(name.startswith(("classifier", "lm_head")) for name in select(model, "attention+mlp", KINDS).modules)


def test_default_without_a_table_entry_is_the_attention_and_says_so() -> None:
    model = vit()
    assert set(select(model, None, KINDS).matched) == {"q_proj", "v_proj"}
    rename(model, "novel")
    selection = select(model, None, KINDS)
    assert selection.matched == {"q_proj": 4, "k_proj": 4, "v_proj": 4, "o_proj": 4}
    assert selection.notice == (
        "The names in 'novel' are not known, so its structure decided on the linear layers in attention blocks: "
        "q_proj (4), k_proj (4), v_proj (4), o_proj (4). To choose yourself, set target_modules to names, a regular "
        "expression, or one of attention, attention+mlp, all-linear."
    )


def test_default_of_a_plain_module_is_all_linear_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    selection = select(model, None, KINDS)
    assert list(selection.modules) == ["0", "2"]
    assert "'Sequential' are not known" in str(selection.notice)
    assert "all linear layers except the head" in str(selection.notice)


def test_a_table_entry_that_fits_nothing_gives_way_to_structure() -> None:
    model = vit()
    rename(model, "gpt2")
    assert "are not known" in str(select(model, None, KINDS).notice)


class Mixed(nn.Module):
    """A model of two towers whose config has the one of its text part."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = hf.CLIPVisionModel(
            hf.CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
        )
        self.language = hf.LlamaModel(hf.LlamaConfig(**SMALL))
        self.config = SimpleNamespace(model_type="novel", text_config=self.language.config)


def test_a_nested_config_adapts_the_text_part_alone() -> None:
    selection = select(Mixed(), None, KINDS)
    assert selection.matched == {"q_proj": 4, "v_proj": 4}
    assert all(name.startswith("language.") for name in selection.modules)
    assert selection.notice == "Only the text part (language, a 'llama') is adapted."


def test_fused_experts_are_said_to_stay_as_they_are() -> None:
    sizes = {**SMALL, "num_key_value_heads": 2, "num_local_experts": 2}
    selection = select(hf.MixtralForCausalLM(hf.MixtralConfig(**sizes)), "attention+mlp", KINDS)
    assert set(selection.matched) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert "feed-forward blocks of 'mixtral' are not made of linear layers" in str(selection.notice)


class WithMultihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(4, 2)
        self.out_proj = nn.Linear(4, 4)


def test_multihead_attention_is_left_alone() -> None:
    model = WithMultihead()
    assert list(select(model, "all-linear", KINDS).modules) == ["out_proj"]
    assert list(select(model, None, KINDS).modules) == ["out_proj"]
    selection = select(model, ["out_proj"], KINDS)
    assert list(selection.modules) == ["out_proj"]
    assert selection.notice == (
        "Left alone, because the module around them uses their weights directly: attn.out_proj."
    )
    message = error(lambda: select(model, ["attn.out_proj"], KINDS))
    assert "'attn.out_proj' matches only what cannot be adapted" in message
    assert "it is part of MultiheadAttention, which uses the weight directly" in message


def test_what_mambas_fused_kernels_read_is_left_alone() -> None:
    model = hf.MambaForCausalLM(hf.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2))
    assert select(model, None, KINDS).matched == {"in_proj": 2}
    assert all(name.endswith("in_proj") for name in select(model, "all-linear", KINDS).modules)
    assert "it is part of MambaMixer, which uses the weight" in error(lambda: select(model, ["out_proj"], KINDS))


def test_what_is_inside_an_adapter_is_never_selected() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].deltas = nn.ModuleDict({"default": nn.Linear(2, 2)})
    assert list(select(model, "all-linear", KINDS).modules) == ["0"]


def test_a_model_of_transformers_without_backbone_keeps_its_classifier_out() -> None:
    config = hf.CLIPConfig(
        text_config={**SMALL, "num_hidden_layers": 1}, vision_config={**SMALL, "num_hidden_layers": 1}, projection_dim=8
    )
    assert not any(
        "classifier" in n for n in select(hf.CLIPForImageClassification(config), "all-linear", KINDS).modules
    )


def test_excluding_a_container_excludes_what_is_inside() -> None:
    model = t5()
    assert all(n.startswith("decoder") for n in ours(model, ["q"], exclude_modules=["encoder"]).modules)


def test_layers_of_unequal_stacks_are_counted_in_each() -> None:
    names = ours(t5(), ["SelfAttention.q"], layers="last 1").modules
    assert list(names) == ["encoder.block.2.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q"]
    assert len(ours(t5(), ["SelfAttention.q"], layers=[2]).modules) == 1
    assert not any("pooler" in name for name in ours(bert(), ["dense"], layers="first 4").modules)


INVENTORY = (
    "Adaptable names in this model: word_embeddings (1), position_embeddings (1), token_type_embeddings (1), "
    "query (4), key (4), value (4), dense (13)."
)
ERRORS: list[tuple[dict[str, Any], list[str]]] = [
    ({"target_modules": ["query", "valeu"]}, ["'valeu' matches no module. Did you mean 'value'", INVENTORY]),
    ({"target_modules": ["self.qury"]}, ["'self.qury' matches no module. Did you mean 'self.query'"]),
    ({"target_modules": "all_linear"}, ["'all_linear' matches no module. Did you mean 'all-linear'"]),
    ({"target_modules": ["all-linear"]}, ["'all-linear' is a preset; give it alone, not in a list."]),
    ({"target_modules": []}, ["the list is empty; name at least one module.", INVENTORY]),
    (
        {"target_modules": ["query", "layer.0"]},
        [
            "'layer.0' matches only what cannot be adapted, bert.encoder.layer.0: it is a BertLayer; the kinds "
            "supported here are Linear, Embedding, Conv1d, Conv2d.",
            INVENTORY,
        ],
    ),
    ({"target_modules": ["classifier"]}, ["it is trained whole, so it takes no adapter"]),
    ({"target_modules": ["key"], "exclude_modules": ["key"]}, ["it is left out by exclude_modules"]),
    ({"target_modules": None, "exclude_modules": ["query", "value"]}, ["target_modules: None selects nothing."]),
    ({"target_modules": "query|value"}, ["whole path of no module. It matches the end of 8 of them: write"]),
    ({"target_modules": "(query"}, ["target_modules: '(query' is not a regular expression: "]),
    ({"target_modules": None, "exclude_modules": ["kye"]}, ["exclude_modules: 'kye' matches no module.", "'key'"]),
    (
        {"target_modules": None, "layers": "last 5"},
        ["layers: 'last 5' reaches beyond the first or last layer. The model has 4 layers (bert.encoder.layer: 4)."],
    ),
    ({"target_modules": None, "layers": "2-4"}, ["layers: '2-4' reaches beyond"]),
    ({"target_modules": None, "layers": [-5]}, ["layers: [-5] reaches beyond"]),
    (
        {"target_modules": None, "layers": "final 2"},
        ["'final 2' is not understood. Expected 'last 4',", "has 4 layers"],
    ),
    ({"target_modules": None, "layers": "3-1"}, ["'3-1' is not understood"]),
    ({"target_modules": None, "layers": []}, ["[] is not understood"]),
    ({"target_modules": ["pooler.dense"], "layers": "5"}, ["layers: '5' was given, but", "lies in no numbered layer"]),
    (
        {"target_modules": r".*\.layer\.[01]\..*query", "layers": "last 1"},
        ["layers: 'last 1' leaves nothing: the modules selected lie in layers 0, 1."],
    ),
]


@pytest.mark.parametrize(("options", "texts"), ERRORS)
def test_errors_say_what_is_wrong_and_what_there_is(options: dict[str, Any], texts: list[str]) -> None:
    target = options.pop("target_modules") if "target_modules" in options else None
    message = error(lambda: ours(bert(), target, **options))
    for text in texts:
        assert text in message


def test_a_model_without_supported_modules_says_so() -> None:
    message = error(lambda: select(nn.Sequential(nn.ReLU()), None, (nn.Linear,)))
    assert message == (
        "target_modules: None selects nothing. This Sequential has no module of a supported kind (Linear)."
    )


def test_kinds_decide_what_can_be_selected() -> None:
    model = gpt2()
    assert select(model, ["c_attn"], (nn.Linear,)).matched == {"c_attn": 4}
    assert "it is a Conv1D; the kinds supported here are Embedding" in error(
        lambda: select(model, ["c_attn"], (nn.Embedding,))
    )
    assert list(select(model, ["wte"], (nn.Embedding,)).modules) == ["transformer.wte"]


def test_matching_takes_the_outer_of_two() -> None:
    model = roberta()
    assert matching(model, ["classifier"]) == ["classifier"]
    assert matching(model, ["classifier.dense", "classifier"]) == ["classifier"]
    assert matching(model, ["layer.0.attention", "query"]) == [
        "roberta.encoder.layer.0.attention",
        *(f"roberta.encoder.layer.{layer}.attention.self.query" for layer in (1, 2, 3)),
    ]
    assert matching(model, []) == []


def test_matching_names_what_is_missing() -> None:
    message = error(lambda: matching(bert(), ["clasifier"]))
    assert message == (
        "'clasifier' matches no module of this BertForSequenceClassification. Did you mean 'classifier' or 'layer'? "
        "Expected a path, or the end of one at a dot. Its parts are bert, dropout, classifier."
    )
    model = hf.DistilBertForSequenceClassification(hf.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2))
    assert matching(model, ["classifier"]) == ["classifier"]


def test_patterns_that_hit_nothing_are_errors() -> None:
    names = list(ours(bert(), None).modules)
    check_patterns("rank_pattern", {"query": 4, r"layer\.[0-2]\..*value": 2}, names)
    message = error(lambda: check_patterns("rank_pattern", {"quary": 4}, names))
    assert message == (
        "rank_pattern: 'quary' matches none of the 8 selected modules. Did you mean 'query'? They end in query, value."
    )
    assert "alpha_pattern: '(q' is not a regular expression" in error(
        lambda: check_patterns("alpha_pattern", {"(q": 4}, names)
    )


def test_selecting_leaves_the_model_as_it_was() -> None:
    model = bert()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    select(model, "all-linear", KINDS, layers="last 1")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
