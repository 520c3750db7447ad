"""Trainable tokens through files, alone and beside a LoRA: ours read by HF PEFT, and HF PEFT's by us."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig
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
    theirs_is_read_by_us,
)
from models import inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import BitFit, LoRA, Stack, TrainableTokens
from strategies.against_peft import assert_near

pytestmark = pytest.mark.filterwarnings("ignore")

TABLES = {
    "bert": "bert.embeddings.word_embeddings",
    "roberta": "roberta.embeddings.word_embeddings",
    "llama": "model.embed_tokens",
    "gpt2": "transformer.wte",
    "t5": "shared",
    "llama_classifier": "model.embed_tokens",
}
ALONE = ["llama", "gpt2", "t5"]
"""Without a head HF PEFT's own type for tokens serves; GPT-2 and T5 tie their output layer to the table."""


def tokens_of(name: str) -> list[int]:
    """Three tokens of the test batch, and one that it has not."""
    inputs = inputs_for(name.removesuffix("_classifier"))
    return [*inputs["input_ids"][1, :3].tolist(), 1]


def rows_in(folder: Path) -> list[str]:
    keys = load_file(folder / "adapter_model.safetensors")
    return sorted(key.removeprefix("base_model.model.") for key in keys if key.endswith("trainable_tokens_delta"))


@pytest.mark.parametrize("name", ALONE)
def test_tokens_alone_that_we_write(name: str, tmp_path: Path) -> None:
    again = ours_is_read_by_both(name, TrainableTokens(tokens_of(name)), tmp_path, "TRAINABLE_TOKENS")
    assert isinstance(again.strategy, TrainableTokens)
    tied = {"t5": ["decoder.embed_tokens", "encoder.embed_tokens", "lm_head"], "gpt2": ["lm_head"]}.get(name, [])
    assert rows_in(tmp_path) == sorted(f"{site}.trainable_tokens_delta" for site in [TABLES[name], *tied])


@pytest.mark.parametrize("name", ["bert", "roberta", "llama_classifier"])
def test_tokens_with_a_head_are_written_beside_a_lora_of_zeros(name: str, tmp_path: Path) -> None:
    again = ours_is_read_by_both(name, TrainableTokens(tokens_of(name)), tmp_path, "LORA")
    assert isinstance(again.strategy, TrainableTokens)
    assert again.trained == heads(name)
    assert config_in(tmp_path)["trainable_token_indices"] == {TABLES[name]: tokens_of(name)}


@pytest.mark.parametrize("name", TABLES)
def test_tokens_beside_a_lora_that_we_write(name: str, tmp_path: Path) -> None:
    strategy = Stack([LoRA(rank=4, use_rslora=True), TrainableTokens(tokens_of(name))])
    again = ours_is_read_by_both(name, strategy, tmp_path, "LORA").strategy
    assert isinstance(again, Stack)
    assert rows_in(tmp_path) == [f"{TABLES[name]}.token_adapter.trainable_tokens_delta"]


def test_tokens_beside_a_pissa_with_biases(tmp_path: Path) -> None:
    lora = LoRA(rank=4, init_lora_weights="pissa", bias="lora_only")
    base, adapter = saved("bert", Stack([lora, TrainableTokens([5, 7])]), tmp_path, ["classifier"])
    expected = computed(adapter.model, inputs_for("bert"))
    again = load_adapter(copy.deepcopy(base), tmp_path)
    assert torch.equal(computed(again.model, inputs_for("bert")), expected)
    assert_near(computed(quietly(base, tmp_path), inputs_for("bert")), expected)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tokens_alone_that_peft_writes(name: str, named: bool, tmp_path: Path) -> None:
    """With a classifier too: HF PEFT leaves the head alone then."""
    targets = [TABLES[name].rpartition(".")[2]] if named else None
    config = TrainableTokensConfig(token_indices=tokens_of(name), target_modules=targets, task_type=TASKS.get(name))
    strategy = theirs_is_read_by_us(name, config, tmp_path).strategy
    assert isinstance(strategy, TrainableTokens)
    assert strategy.token_indices == tokens_of(name)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", TABLES)
def test_tokens_beside_a_lora_that_peft_writes(name: str, named: bool, tmp_path: Path) -> None:
    indices: Any = {TABLES[name].rpartition(".")[2]: tokens_of(name)} if named else tokens_of(name)
    config = LoraConfig(r=3, trainable_token_indices=indices, task_type=TASKS.get(name))
    strategy = theirs_is_read_by_us(name, config, tmp_path).strategy
    assert isinstance(strategy, Stack)
    assert [type(member) for member in strategy.strategies] == [LoRA, TrainableTokens]


@pytest.mark.parametrize(
    "strategy",
    [
        Stack([LoRA(rank=2, target_modules=["wte", "c_attn"]), TrainableTokens([3])]),
        Stack([TrainableTokens([3]), LoRA(rank=2)]),
        Stack([LoRA(rank=2), BitFit()]),
        Stack([LoRA(rank=2), TrainableTokens([3]), TrainableTokens([4])]),
    ],
)
def test_other_stacks_have_our_own_format(strategy: Stack, tmp_path: Path) -> None:
    ours, adapter = saved("gpt2", strategy, tmp_path, [])
    assert config_in(tmp_path)["peft_type"] == "PEFTLIGHT_STACK"
    again = load_adapter(ours, tmp_path)
    assert torch.equal(computed(again.model, inputs_for("gpt2")), computed(adapter.model, inputs_for("gpt2")))


def test_a_tied_layer_with_a_bias_has_our_own_format(tmp_path: Path) -> None:
    """HF PEFT forgets the bias of the output layer there."""
    base = make("gpt2")
    base.lm_head.bias = nn.Parameter(torch.ones(base.lm_head.out_features))
    save_adapter(attach(base, TrainableTokens([3])), tmp_path)
    assert config_in(tmp_path)["peft_type"] == "PEFTLIGHT_TRAINABLETOKENS"


KEY = "base_model.model.transformer.wte.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.trainable_tokens_delta"
OTHER = "base_model.model.transformer.h.0.attn.c_attn.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"token_indices": "all"}, {}, "token_indices is 'all'; expected a list of the numbers of tokens"),
        ({"token_indices": [1, 200]}, {}, "200 lie outside transformer.wte, which has tokens 0 to 99"),
        ({"token_indices": [1, 1]}, {}, "names a token twice"),
        ({"token_indices": [1, 2, 3]}, {}, r"rows of transformer.wte have shape \(2, 32\); .* need \(3, 32\)"),
        ({"target_modules": ["wpe"]}, {}, "missing: trainable_tokens_delta of transformer.wpe, which target"),
        ({"an_option": [1]}, {}, r"not supported here: an_option=\[1\]"),
        ({}, {KEY: torch.zeros(2, 31)}, r"rows of transformer.wte have shape \(2, 31\)"),
        ({}, {KEY: torch.zeros(2, 32)}, "tied in this model, but their rows differ in the file"),
        ({}, {HEAD: None}, "missing: trainable_tokens_delta of lm_head"),
        ({}, {OTHER: torch.zeros(2, 32)}, "c_attn is a Conv1D; trainable tokens need an embedding"),
        ({}, {"base_model.model.x.trainable_tokens_delta": torch.zeros(2, 32)}, "unexpected: .*x.trainable"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, _ = saved("gpt2", TrainableTokens([3, 4]), tmp_path, [])
    changed(tmp_path, config, tensors)
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert not any("deltas" in key for key in base.state_dict())


BESIDE = "base_model.model.bert.embeddings.word_embeddings.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"trainable_token_indices": {"a": [1], "b": [2]}}, {}, "names other tokens for each of a, b"),
        ({"trainable_token_indices": {"word_embeddings": "x"}}, {}, "is 'x'; expected a list of the numbers"),
        ({"trainable_token_indices": [4.5]}, {}, r"is \[4.5\]; expected a list"),
        ({"trainable_token_indices": [4]}, {}, r"have shape \(2, 32\); the model and the config need \(1, 32\)"),
        ({"trainable_token_indices": None}, {}, "unexpected: .*token_adapter"),
        ({"trainable_token_indices": {"position_embeddings": [3, 4]}}, {}, "missing: .*position_embeddings"),
        ({"trainable_token_indices": {"nowhere": [3, 4]}}, {}, "names nowhere, which is not there"),
        ({}, {BESIDE: None}, "but the file has no rows for these tokens"),
        ({}, {BESIDE: torch.zeros(2, 33)}, r"have shape \(2, 33\)"),
    ],
)
def test_files_with_a_lora_that_do_not_fit_are_refused(
    config: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    base, _ = saved("bert", Stack([LoRA(rank=2), TrainableTokens([3, 4])]), tmp_path, [])
    changed(tmp_path, config, tensors)
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path)
    assert not any("deltas" in key for key in base.state_dict())
