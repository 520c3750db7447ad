"""Every strategy of `configs/` keeps every promise, by the same kit that a user's own strategy is checked with."""

import pytest

from models import MODELS, inputs_for
from peftlight.testing import check_strategy
from peftlight.testing.conformance import PROCESSES, Tiny, in_two_processes
from peftlight.testing.training import Case
from recipes import RECIPES

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

QUICK = ("bert", "llama")
REFUSED = {
    "bitfit": {"llama", "t5"},
    "bitfit_subset": {"llama", "gpt2", "t5"},
    "prompt": {"vit"},
    "p_tuning": {"vit"},
    "trainable_tokens": {"vit"},
}
"""Models that a strategy cannot serve; all others it must."""
TRACED = {("lora", "gpt2"), ("lora", "t5"), ("prefix", "gpt2"), ("prefix", "t5"), ("prompt", "t5")}
"""What is compiled beside the quick models, for tracing takes longer than all else: another kind of linear layer, past
keys, and an encoder with a decoder."""


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        pytest.param(recipe, model, marks=[] if model in QUICK else pytest.mark.slow)
        for recipe in RECIPES
        for model in MODELS
    ],
)
def test_every_promise_is_kept(recipe: str, model: str) -> None:
    models = {model: (Tiny(model), inputs_for(model))}
    left_out = [PROCESSES] if model in QUICK or (recipe, model) in TRACED else [PROCESSES, "compiles"]
    if model in REFUSED.get(recipe, set()):
        with pytest.raises(AssertionError, match="serves none of the models"):
            check_strategy(RECIPES[recipe], models, leave_out=left_out)
        return
    results = check_strategy(RECIPES[recipe], models, leave_out=left_out)
    assert {result.outcome for result in results} == {"kept"}


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one() -> None:
    cases = {recipe: Case(make, Tiny("bert"), inputs_for("bert")) for recipe, make in RECIPES.items()}
    broken = [str(result) for result in in_two_processes(cases) if result.outcome != "kept"]
    assert not broken
