"""LayerNorm tuning equals HF PEFT's, which trains copies of the layers."""

import pytest
from peft import LNTuningConfig

from models import MODELS, make
from peftlight import attach
from peftlight.errors import UserError
from peftlight.strategies import LayerNormTuning
from strategies.against_peft import parity_of

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

NORMS = {
    "bert": ["LayerNorm"],
    "roberta": ["LayerNorm"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "t5": ["layer_norm", "final_layer_norm"],
    "vit": ["layernorm_before", "layernorm_after", "layernorm"],
}


def parity(architecture: str) -> dict[str, float]:
    theirs = LNTuningConfig(target_modules=NORMS[architecture])
    return parity_of(architecture, LayerNormTuning(), theirs, {".ln_tuning_layers.default": ""})


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_hf_peft(name: str) -> None:
    assert max(parity(name).values()) < 1e-5


def test_only_the_layers_named_are_trained() -> None:
    trained = attach(make("llama"), LayerNormTuning(target_modules=["input_layernorm"])).parameters()
    assert list(trained) == ["model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"]


def test_another_layer_is_refused() -> None:
    with pytest.raises(UserError, match="q_proj are no normalisation layers"):
        attach(make("llama"), LayerNormTuning(target_modules=["layers.0.self_attn.q_proj"]))
