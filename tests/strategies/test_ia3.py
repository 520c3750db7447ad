"""(IA)³ equals HF PEFT's, and scales what the paper says by default."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config

from models import MODELS, inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import IA3
from strategies.against_peft import output, parity_of
from strategies.small import stirred

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

# Where HF PEFT's list of the feed-forward part ends the name of another layer too, the whole path is written.
PLACES = {
    "bert": (["key", "value", "1.output.dense"], ["1.output.dense"]),
    "roberta": (["key", "value", "1.output.dense"], ["1.output.dense"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "vit": (["k_proj", "v_proj", "fc2"], ["fc2"]),
}


def parity(architecture: str) -> dict[str, float]:
    targets, feed_forward = PLACES[architecture]
    ours = IA3(target_modules=targets, feedforward_modules=feed_forward)
    theirs = IA3Config(target_modules=targets, feedforward_modules=feed_forward)
    return parity_of(architecture, ours, theirs, {"ia3_l.default": "deltas.default.l"})


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_hf_peft(name: str) -> None:
    assert max(parity(name).values()) < 1e-5


def test_the_papers_places_are_the_default() -> None:
    sites = attach(make("t5"), IA3()).sites
    decoder = {name.removeprefix("decoder.block.1."): type(delta).__name__ for name, delta in sites.items()
               if name.startswith("decoder.block.1.")}  # fmt: skip
    assert decoder == {
        "layer.0.SelfAttention.k": "OutputScale",
        "layer.0.SelfAttention.v": "OutputScale",
        "layer.1.EncDecAttention.k": "OutputScale",
        "layer.1.EncDecAttention.v": "OutputScale",
        "layer.2.DenseReluDense.wo": "InputScale",
    }


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged_and_files_come_back(name: str, tmp_path: Path) -> None:
    model, inputs = make(name), inputs_for(name)
    adapter = attach(model, IA3())
    stirred(adapter)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    apart = output(model, inputs)
    save_adapter(adapter, tmp_path)
    fresh = make(name)
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh, inputs), apart)
    adapter.merge()
    assert torch.allclose(output(model, inputs), apart, atol=1e-5)
    adapter.unmerge()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_feed_forward_layer_that_is_not_adapted_is_refused() -> None:
    with pytest.raises(UserError, match="are not among the layers that target_modules selects"):
        attach(make("llama"), IA3(target_modules=["k_proj"], feedforward_modules=["down_proj"]))
