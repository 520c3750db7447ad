"""A batch with an adapter for each row: against the rows computed apart; refused where rows cannot be told apart."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, XLNetConfig, XLNetModel

from models import MODELS, inputs_for, make
from peftlight.adapters import Adapters
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.strategy import PEFTStrategy
from strategies.against_peft import output


def with_two(model: nn.Module, strategy: PEFTStrategy, heads: tuple[str, ...] = ()) -> Adapters:
    """Two adapters of the recipe, "a" and "b", with other values; both off."""
    adapters = Adapters(model.eval())
    for seed, name in enumerate("ab"):
        generator = torch.Generator().manual_seed(seed)
        adapters.attach(strategy, name, modules_to_train=heads)
        adapters.use(name)
        with torch.no_grad():
            for parameter in adapters[name].parameters().values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapters.use()
    return adapters


def compare(adapters: Adapters, names: list[str | None], inputs: dict[str, Tensor]) -> None:
    """See that the batch equals its rows computed apart, and that these depend on the adapter."""
    computed = {}
    with torch.no_grad():
        for name in {*names, "a", None}:
            adapters.use(*([name] if name else []))
            computed[name] = output(adapters.model, inputs)
        adapters.use()
        with adapters.rows(names):
            together = output(adapters.model, inputs)
    assert float((computed["a"] - computed[None]).abs().max()) > 1e-3
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row], computed[name][row], rtol=1e-5, atol=1e-5)


def tied_llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, num_key_value_heads=2, tie_word_embeddings=True, **sizes))


TIED = {
    "llama": (tied_llama, ("lm_head", "model.embed_tokens")),
    "gpt2": (lambda: make("gpt2"), ("lm_head", "transformer.wte")),
    "t5": (lambda: make("t5"), ("lm_head", "shared")),
}


@pytest.mark.parametrize(("name", "head"), [(name, head) for name, (_, heads) in TIED.items() for head in heads])
def test_a_tied_tensor_is_each_rows_own_wherever_it_is_used(name: str, head: str) -> None:
    adapters = with_two(TIED[name][0](), LoRA(rank=2), (head,))
    compare(adapters, ["a", None, "b", "a"], inputs_for(name))


@pytest.mark.parametrize("length", [4, 7])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_architecture_and_a_batch_with_as_many_tokens_as_rows(name: str, length: int) -> None:
    adapters = with_two(make(name), LoRA(rank=2, target_modules="all-linear"))
    compare(adapters, ["b", "a", None, "b"], inputs_for(name, length=length))


@pytest.mark.parametrize("rows", [2, 4])
def test_a_batch_of_four_tokens_and_rows_is_told_apart_in_embeddings_too(rows: int) -> None:
    adapters = with_two(make("gpt2"), LoRA(rank=2, target_modules=["wte"]))
    compare(adapters, ["a", None, "b", "a"][:rows], inputs_for("gpt2", batch=rows, length=4))


@pytest.mark.parametrize(("rows", "length"), [(2, 6), (4, 2), (4, 4), (6, 3)])
def test_a_model_that_puts_tokens_before_rows_is_refused(rows: int, length: int) -> None:
    torch.manual_seed(0)
    model = XLNetModel(XLNetConfig(vocab_size=50, d_model=32, n_layer=2, n_head=2, d_inner=64, dropout=0.0))
    adapters = with_two(model, LoRA(rank=2, target_modules=["layer_1"]))
    ids = torch.randint(0, 50, (rows, length))
    with pytest.raises(UserError, match="does not count the"), adapters.rows([*"ab" * (rows // 2)]):
        model(ids)
    assert not model._forward_pre_hooks
    assert "generate" not in model.__dict__


@pytest.mark.parametrize("names", [["a", None], ["a"], ["a"] * 8])
def test_a_batch_of_another_number_of_rows_is_refused(names: list[str | None]) -> None:
    adapters = with_two(make("gpt2"), LoRA(rank=2))
    inputs = inputs_for("gpt2")
    with adapters.rows(names):
        with pytest.raises(UserError, match=f"said to have {len(names)} rows, but .* got 4"):
            adapters.model(**inputs)
        with pytest.raises(UserError, match=f"said to have {len(names)} rows, but generate got 4"):
            adapters.model.generate(inputs["input_ids"], max_new_tokens=1)


def test_a_model_that_cannot_be_tried_is_refused_where_it_matters() -> None:
    adapters = with_two(make("llama_classifier"), LoRA(rank=2))
    adapters.model.config.pad_token_id = None  # without which it takes one row at a time
    inputs = {"input_ids": inputs_for("llama", batch=2, length=2)["input_ids"]}
    with pytest.raises(UserError, match="Pad the rows to another length"), adapters.rows(["a", None]):
        adapters.model(**inputs)
