"""Prompt tuning equals a plain model given [P; E(x)] by hand, and with `compat: peft` HF PEFT's."""

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    MistralForCausalLM,
    T5ForTokenClassification,
)

from models import inputs_for, make
from peftlight import Adapter, attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import PromptTuning
from peftlight.strategy import Material
from strategies.against_peft import assert_near, loss_of, losses, output, pair, parity_of, stir
from strategies.prompts import TASKS, endings, heads, padded, rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:Position ids are not supported"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
COUNT = 5
DECODERS = ["llama", "gpt2"]


def parity(architecture: str) -> dict[str, float]:
    """HF PEFT's numbers, with everything that differs from ours switched to its way."""
    ours = PromptTuning(COUNT, init="random", compat="peft")
    theirs = PromptTuningConfig(task_type=TASKS[architecture], num_virtual_tokens=COUNT)
    return parity_of(
        architecture, ours, theirs, endings(architecture, {"embedding.weight": "weight"}), **heads(architecture)
    )


@pytest.mark.parametrize("name", TASKS)
def test_it_equals_hf_peft(name: str) -> None:
    assert max(parity(name).values()) < 1e-5


@pytest.mark.parametrize("name", TASKS)
def test_gradients_equal_hf_pefts_however_small_they_are(name: str) -> None:
    ours = PromptTuning(COUNT, init="random", compat="peft")
    config = PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=COUNT)
    adapter, theirs = pair(make(name), ours, config, **heads(name))
    stir(adapter, theirs.eval(), endings(name, {"embedding.weight": "weight"}))
    loss_of(adapter.model, inputs_for(name)).backward()
    loss_of(theirs, inputs_for(name)).backward()
    expected = theirs.prompt_encoder["default"].embedding.weight.grad
    size = expected.abs().max()
    assert size > 0
    assert_near(prompt_of(adapter).grad / size, expected / size, 1e-5)


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_it_starts_as_hf_peft_does(name: str, init: str) -> None:
    ours = PromptTuning(COUNT, init="random" if init == "RANDOM" else "sampled_vocabulary", compat="peft")
    theirs = PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=COUNT, prompt_tuning_init=init)
    adapter, other = pair(make(name), ours, theirs)
    assert torch.equal(prompt_of(adapter), other.prompt_encoder["default"].embedding.weight)


@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_without_compat_the_real_tokens_of_rows_without_padding_get_hf_pefts_logits(name: str) -> None:
    config = PromptTuningConfig(task_type=TASKS[name], num_virtual_tokens=COUNT)
    adapter, theirs = pair(make(name), PromptTuning(COUNT), config)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight[:COUNT].copy_(prompt_of(adapter))
    inputs = inputs_for(name)
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    ours, others = output(adapter.model, inputs), output(theirs.eval(), inputs)
    assert ours.shape[1] == inputs["labels"].shape[1]
    assert_near(ours, others[:, -ours.shape[1] :])


def prompt_of(adapter: Adapter) -> nn.Parameter:
    (prompt,) = (p for name, p in adapter.parameters().items() if name.endswith("prompt.weight"))
    return prompt


def stirred(name: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """A plain model, a copy with virtual tokens of some size, and these (1, n, width)."""
    plain = make(name)
    model = copy.deepcopy(plain)
    adapter = attach(model, PromptTuning(COUNT, **options))
    torch.manual_seed(6)
    with torch.no_grad():
        prompt_of(adapter).normal_(std=0.5)
    return plain, model, prompt_of(adapter).detach()[None]


def by_hand(plain: nn.Module, prompt: Tensor, row: Tensor) -> Tensor:
    """[P; E(x)] of one row without padding."""
    return torch.cat([prompt, plain.get_input_embeddings()(row)], 1)


@torch.no_grad()
@pytest.mark.parametrize("embedded", [False, True], ids=["tokens", "embeddings"])
@pytest.mark.parametrize("name", [*DECODERS, "llama_classifier", "roberta"])
def test_the_logits_are_those_of_the_concatenation(name: str, embedded: bool) -> None:
    plain, model, prompt = stirred(name)
    (row,) = rows((7,))
    given = {"inputs_embeds": plain.get_input_embeddings()(row)} if embedded else {"input_ids": row}
    if name == "roberta":
        hidden = plain.roberta(inputs_embeds=by_hand(plain, prompt, row)).last_hidden_state
        expected = plain.classifier(hidden[:, COUNT:])
    else:
        expected = plain(inputs_embeds=by_hand(plain, prompt, row)).logits
    found = model(**given).logits
    assert_near(found, expected[:, -7:] if expected.dim() == 3 else expected)
    assert (found - plain(**given).logits).abs().max() > 1e-3


@torch.no_grad()
def test_bert_pools_the_first_real_token() -> None:
    plain, model, prompt = stirred("bert")
    (row,) = rows((7,))
    hidden = plain.bert(inputs_embeds=by_hand(plain, prompt, row)).last_hidden_state
    expected = plain.classifier(torch.tanh(plain.bert.pooler.dense(hidden[:, COUNT])))
    assert_near(model(row).logits, expected)
    assert (expected - plain.classifier(plain.bert.pooler(hidden))).abs().max() > 1e-4


@torch.no_grad()
def test_so_does_albert_whose_pooler_is_given_one_token() -> None:
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=100, embedding_size=16, hidden_size=32, num_hidden_layers=2,
                          num_attention_heads=4, intermediate_size=64, num_labels=3)  # fmt: skip
    plain = AlbertForSequenceClassification(config).eval()
    model, (row,) = copy.deepcopy(plain), rows((7,))
    prompt = prompt_of(attach(model, PromptTuning(COUNT)))[None]
    hidden = plain.albert(inputs_embeds=by_hand(plain, prompt, row)).last_hidden_state
    expected = plain.classifier(torch.tanh(plain.albert.pooler(hidden[:, COUNT])))
    found = model(row, output_hidden_states=True)
    assert_near(found.logits, expected)
    assert {state.shape[1] for state in found.hidden_states} == {7}


@torch.no_grad()
def test_t5_reads_the_concatenation() -> None:
    plain, model, prompt = stirred("t5")
    row, answer = rows((7, 4))
    expected = plain(inputs_embeds=by_hand(plain, prompt, row), decoder_input_ids=answer).logits
    assert_near(model(input_ids=row, decoder_input_ids=answer).logits, expected)
    mask = torch.ones_like(row)
    assert_near(model(input_ids=row, attention_mask=mask, decoder_input_ids=answer).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "roberta", *DECODERS])
def test_padding_on_either_side_changes_no_real_token(name: str, side: str) -> None:
    _, model, _ = stirred(name)
    backbone = getattr(model, model.base_model_prefix)
    batch = padded(rows(), side, token=1 if name == "roberta" else 0)
    together = backbone(**batch).last_hidden_state
    assert together.shape[1] == 7
    for row, states, mask in zip(rows(), together, batch["attention_mask"], strict=True):
        assert_near(states[mask.bool()], backbone(row).last_hidden_state[0], where=str(row.shape))


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", [MistralForCausalLM, T5ForTokenClassification], ids=["window", "distances"])
def test_so_it_is_where_attention_goes_by_distance(kind: Any, side: str) -> None:
    """Mistral sees a window of tokens, T5 weighs them by their distance: padding must not lie in between."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_layers": 2,
             "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 4, "d_model": 32, "d_kv": 8,
             "d_ff": 64, "num_heads": 4}  # fmt: skip
    names = inspect.signature(kind.config_class).parameters
    model = kind(kind.config_class(**{key: value for key, value in sizes.items() if key in names})).eval()
    nn.init.normal_(prompt_of(attach(model, PromptTuning(COUNT))), std=0.5)
    batch = padded(rows(), side)
    found = model(**batch, output_hidden_states=True)
    assert {state.shape[1] for state in found.hidden_states} == {7}
    for row, logits, mask in zip(rows(), found.logits, batch["attention_mask"], strict=True):
        assert_near(logits[mask.bool()], model(row).logits[0], 2e-6)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama_classifier", "t5"])
def test_padding_on_either_side_changes_no_answer(name: str, side: str) -> None:
    _, model, _ = stirred(name)
    answer = {"decoder_input_ids": rows((4,))[0]} if name == "t5" else {}
    batch = padded(rows(), side) | {key: value.expand(3, -1) for key, value in answer.items()}
    for row, logits in zip(rows(), model(**batch).logits, strict=True):
        assert_near(logits, model(input_ids=row, **answer).logits[0])


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_positions_that_are_given_move_behind_the_virtual_tokens(name: str, side: str) -> None:
    _, model, _ = stirred(name)
    batch = padded(rows(), side)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    real = batch["attention_mask"].bool()
    assert_near(model(**batch, position_ids=positions).logits[real], model(**batch).logits[real])


@torch.no_grad()
@pytest.mark.parametrize("compat", [None, "peft"])
@pytest.mark.parametrize("name", DECODERS)
def test_generating_with_a_cache_equals_stepping_without(name: str, compat: Any) -> None:
    _, model, _ = stirred(name, compat=compat)
    batch = padded(rows((6, 6) if compat else (7, 3, 5)), "left")
    found = model.generate(**batch, **GREEDY, eos_token_id=None)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for logits in found.logits:
        step = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]
        assert_near(logits, step, 2e-6)
        ids, mask = torch.cat([ids, step.argmax(-1, keepdim=True)], 1), nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(found.sequences, ids)


GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True,
                          "return_dict_in_generate": True}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_t5_generates_with_a_cache_what_it_gives_step_by_step(side: str) -> None:
    _, model, _ = stirred("t5")
    batch = padded(rows(), side)
    found = model.generate(**batch, **GREEDY)
    answer = torch.zeros(3, 1, dtype=torch.long)
    for logits in found.logits:
        step = model(**batch, decoder_input_ids=answer, use_cache=False).logits[:, -1]
        assert_near(logits, step, 2e-6)
        answer = torch.cat([answer, step.argmax(-1, keepdim=True)], 1)


@torch.no_grad()
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_beam_search_finds_the_same_with_and_without_a_cache(name: str) -> None:
    _, model, _ = stirred(name)
    options: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    batch = padded(rows(), "left")
    assert torch.equal(model.generate(**batch, **options), model.generate(**batch, **options, use_cache=False))


@torch.no_grad()
def test_everything_that_a_model_gives_out_has_the_users_length() -> None:
    _, model, _ = stirred("bert")
    model.set_attn_implementation("eager")
    inputs = inputs_for("bert")
    found = model.bert(inputs["input_ids"], output_hidden_states=True, output_attentions=True)
    assert found.last_hidden_state.shape[1] == 7
    assert [state.shape[1] for state in found.hidden_states] == [7, 7, 7]
    assert [weights.shape[2:] for weights in found.attentions] == [(7, 12), (7, 12)]
    states, pooled = model.bert(inputs["input_ids"], return_dict=False)
    assert torch.equal(states, found.last_hidden_state)
    assert torch.equal(pooled, found.pooler_output)


@pytest.mark.parametrize("name", ["bert", "roberta", *DECODERS, "t5"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = make(name)
        adapter = attach(model, PromptTuning(COUNT, init="random"))
        with torch.no_grad():
            prompt_of(adapter).copy_(torch.linspace(-1, 1, COUNT * 32).view(COUNT, 32))
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        loss_of(model, inputs_for(name)).backward()
        gradients.append(prompt_of(adapter).grad)
    size = gradients[0].abs().max()
    assert_near(gradients[1] / size, gradients[0] / size, 1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", *DECODERS])
def test_it_compiles_without_a_graph_break(name: str) -> None:
    _, model, _ = stirred(name)
    inputs = inputs_for(name)
    del inputs["labels"]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_near(compiled(**inputs).logits, output(model, inputs))


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_a_base_in_bfloat16(name: str) -> None:
    model = make(name).bfloat16()
    adapter = attach(model, PromptTuning(COUNT))
    assert output(model, inputs_for(name)).dtype == torch.bfloat16
    loss_of(model, inputs_for(name)).backward()
    assert prompt_of(adapter).grad.dtype == torch.float32


@pytest.mark.parametrize("name", TASKS)
def test_it_trains_and_comes_off_again(name: str) -> None:
    plain, model = make(name), make(name)
    adapter = attach(model, PromptTuning(COUNT))
    seen = losses(model, list(adapter.parameters().values()), inputs_for(name))
    assert seen[-1] < seen[0]
    model.eval()
    with torch.no_grad():
        expected = output(plain, inputs_for(name))
        with adapter.disabled():
            assert torch.equal(output(model, inputs_for(name)), expected)
        adapter.remove()
        assert torch.equal(output(model, inputs_for(name)), expected)


@torch.no_grad()
@pytest.mark.parametrize("compat", [None, "peft"])
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_files_come_back(name: str, compat: Any, tmp_path: Path) -> None:
    model = make(name)
    adapter = attach(model, PromptTuning(COUNT, init="text", init_token_ids=[4, 9], compat=compat))
    prompt_of(adapter).add_(0.1)
    save_adapter(adapter, tmp_path)
    other = make(name)
    assert load_adapter(other, tmp_path).strategy == adapter.strategy
    assert torch.equal(output(other, inputs_for(name)), output(model, inputs_for(name)))


@torch.no_grad()
@pytest.mark.parametrize("compat", [None, "peft"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_copies_compute_the_same_and_merging_is_refused(name: str, compat: Any) -> None:
    model = make(name)
    adapter = attach(model, PromptTuning(COUNT, compat=compat))
    expected = output(model, inputs_for(name))
    for twin in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):
        prompt_of(adapter).add_(0.1)
        assert torch.equal(output(twin.model, inputs_for(name)), expected)
    with pytest.raises(UserError, match="cannot be merged"):
        adapter.merge()


@torch.no_grad()
def test_two_prompts_nest() -> None:
    plain, model, prompt = stirred("llama")
    second = prompt_of(attach(model, PromptTuning(3), "second"))[None]
    (row,) = rows((7,))
    expected = plain(inputs_embeds=by_hand(plain, torch.cat([prompt, second], 1), row)).logits[:, -7:]
    assert_near(model(row).logits, expected)
    batch = padded(rows(), "left")
    with_cache, without = (model.generate(**batch, **GREEDY, use_cache=cache) for cache in (True, False))
    assert_near(torch.stack(with_cache.logits), torch.stack(without.logits), 2e-6)


# ---- what they start from


def test_sampled_tokens_are_rows_of_the_table() -> None:
    model = make("llama")
    table = model.get_input_embeddings().weight.detach()
    prompt = prompt_of(attach(model, PromptTuning(COUNT))).detach()
    assert all((table == row).all(1).any() for row in prompt)


def test_random_ones_are_as_large_as_embeddings() -> None:
    model = make("bert")
    prompt = prompt_of(attach(model, PromptTuning(30, init="random"))).detach()
    assert float(prompt.std()) == pytest.approx(float(model.get_input_embeddings().weight.std()), rel=0.1)


@pytest.mark.parametrize("tokens", [[4, 9], [4, 9, 7, 30, 2, 11, 5]], ids=["repeated", "cut"])
def test_a_text_is_repeated_or_cut(tokens: list[int]) -> None:
    expected = (tokens * 3)[:COUNT]
    model = make("gpt2")
    adapter = attach(model, PromptTuning(COUNT, init="text", init_text="good or bad"))
    adapter.strategy.prepare(adapter, material(tokens))
    assert torch.equal(prompt_of(adapter), model.get_input_embeddings()(torch.tensor(expected)))
    explicit = attach(make("gpt2"), PromptTuning(COUNT, init="text", init_token_ids=tokens))
    assert torch.equal(prompt_of(explicit), prompt_of(adapter))


def material(tokens: list[int]) -> Material:
    return Material(batches=lambda: [], token_ids=lambda text: tokens)


def test_nothing_is_computed_or_saved_before_the_text_is_there(tmp_path: Path) -> None:
    model = make("bert")
    adapter = attach(model, PromptTuning(COUNT, init="text", init_text="good or bad"))
    with pytest.raises(UserError, match=r"to start from init_text, but .* give init_token_ids"):
        output(model, inputs_for("bert"))
    with pytest.raises(UserError, match="not finite"):
        save_adapter(adapter, tmp_path)
    state = {key: torch.ones_like(value) for key, value in adapter.state().items()}
    adapter.load_state(state)
    assert output(model, inputs_for("bert")).isfinite().all()


# ---- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": 0}, "at least one virtual token; num_virtual_tokens is 0"),
        ({"init": "txt"}, "init is 'txt'; expected .* Did you mean 'text'"),
        ({"init": "text"}, "needs init_text or init_token_ids; got neither"),
        ({"init": "text", "init_text": "a", "init_token_ids": [1]}, "got init_text and init_token_ids"),
        ({"init": "text", "init_text": "  "}, "init_text is empty"),
        ({"init": "text", "init_token_ids": []}, "init_token_ids is empty"),
        ({"init_text": "a"}, "init_text belongs to init: text, but init is sampled_vocabulary"),
        ({"compat": "pft"}, "compat is 'pft'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptTuning(**options)


def test_tokens_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(UserError, match="from 3 to 100, but the model has embeddings for 0 to 99"):
        attach(make("bert"), PromptTuning(COUNT, init="text", init_token_ids=[3, 100]))
    adapter = attach(make("bert"), PromptTuning(COUNT, init="text", init_text="\u200b"))
    with pytest.raises(UserError, match="has no tokens"):
        adapter.strategy.prepare(adapter, material([]))


@pytest.mark.parametrize(("name", "most"), [("bert", 40), ("roberta", 38), ("gpt2", 40), ("llama", 40)])
def test_there_must_be_positions_left(name: str, most: int) -> None:
    with pytest.raises(UserError, match=f"num_virtual_tokens is {most}, but the model has {most} positions"):
        attach(make(name), PromptTuning(most))
    model = make(name)
    attach(model, PromptTuning(10))
    assert output(model, inputs_for(name, length=most - 10)).isfinite().all()
    with pytest.raises(UserError, match=f"Rows of {most - 9} tokens and 10 virtual tokens need {most + 1} positions"):
        output(model, inputs_for(name, length=most - 9))


def test_models_that_take_in_no_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"ViTForImageClassification has no place for that.* Choose LoRA"):
        attach(make("vit"), PromptTuning())
    with pytest.raises(UserError, match="Sequential has no place for that"):
        attach(nn.Sequential(nn.Linear(2, 2)), PromptTuning())
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with pytest.raises(UserError, match="MambaForCausalLM has another"):
        attach(MambaForCausalLM(MambaConfig(vocab_size=50, **sizes)), PromptTuning())


def test_masks_that_nobody_can_extend_are_refused() -> None:
    _, model, _ = stirred("llama")
    with pytest.raises(UserError, match=r"the shape \(batch, tokens\); got \(1, 1, 7, 7\)"):
        model(rows((7,))[0], attention_mask=torch.ones(1, 1, 7, 7))
    with pytest.raises(UserError, match="leave cache_implementation out"):
        model.generate(**padded(rows(), "left"), **GREEDY, cache_implementation="static")
    with pytest.raises(UserError, match="either input_ids or inputs_embeds"):
        model()
