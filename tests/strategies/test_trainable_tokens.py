"""Trainable tokens equal HF PEFT's, and training only some rows of the whole table."""

import copy
from pathlib import Path

import pytest
import torch
from peft import TrainableTokensConfig

from models import inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import TrainableTokens
from strategies.against_peft import loss_of, output, parity_of
from strategies.small import stirred

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TEXT = ["bert", "roberta", "llama", "gpt2", "t5"]
TABLES = {
    "bert": "word_embeddings",
    "roberta": "word_embeddings",
    "llama": "embed_tokens",
    "gpt2": "transformer.wte",
    "t5": "shared",
}


ENDINGS = {
    "token_adapter.trainable_tokens_delta.default": "deltas.default.rows.values",
    "trainable_tokens_delta.default": "deltas.default.rows.values",
}


def tokens_of(name: str) -> list[int]:
    """Three tokens of the test batch, and one that it has not."""
    return [*inputs_for(name)["input_ids"][1, :3].tolist(), 1]


def parity(architecture: str) -> dict[str, float]:
    theirs = TrainableTokensConfig(token_indices=tokens_of(architecture), target_modules=[TABLES[architecture]])
    return parity_of(architecture, TrainableTokens(tokens_of(architecture)), theirs, ENDINGS)


@pytest.mark.parametrize("name", ["bert", "roberta", "llama"])
def test_it_equals_hf_peft(name: str) -> None:
    assert max(parity(name).values()) < 1e-5


@pytest.mark.parametrize("name", TEXT)
def test_it_equals_training_those_rows_of_the_table(name: str) -> None:
    """Ties included: GPT-2's and T5's output layer is the table itself."""
    tokens, inputs = tokens_of(name), inputs_for(name)
    plain, model = make(name).requires_grad_(False), make(name)
    adapter = attach(model, TrainableTokens(tokens))
    assert torch.equal(output(model, inputs), output(plain, inputs)) or name in ("gpt2", "t5")
    stirred(adapter)
    (rows,) = adapter.parameters().values()
    table = plain.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        table[tokens] = rows
    assert torch.allclose(output(model, inputs), output(plain, inputs), atol=1e-5)
    loss_of(model, inputs).backward()
    loss_of(plain, inputs).backward()
    assert torch.allclose(rows.grad, table.grad[tokens], atol=1e-6)


@pytest.mark.parametrize("name", TEXT)
def test_files_come_back(name: str, tmp_path: Path) -> None:
    model, inputs = make(name), inputs_for(name)
    fresh = copy.deepcopy(model)
    save_adapter(stirred(attach(model, TrainableTokens(tokens_of(name)))), tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh, inputs), output(model, inputs))


def test_merging_writes_the_rows() -> None:
    model, inputs = make("llama"), inputs_for("llama")
    adapter = stirred(attach(model, TrainableTokens(tokens_of("llama"))))
    apart = output(model, inputs)
    adapter.merge()
    assert torch.equal(output(model, inputs), apart)
    tied = stirred(attach(make("gpt2"), TrainableTokens([3])))
    with pytest.raises(UserError, match="its weight is shared by"):
        tied.merge()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([], "the list is empty"), ([3, 3], "twice"), ([5, 100], "100 lie outside .*which has tokens 0 to 99")],
)
def test_wrong_tokens_are_refused(tokens: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        attach(make("bert"), TrainableTokens(tokens))


def test_a_model_without_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="does not say which that is"):
        attach(make("vit"), TrainableTokens([1]))
