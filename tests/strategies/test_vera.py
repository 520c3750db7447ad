"""VeRA equals HF PEFT's: the shared matrices bit for bit, outputs, gradients and training."""

from pathlib import Path

import pytest
import torch
from peft import VeraConfig, get_peft_model
from safetensors.torch import load_file

from models import MODELS, inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.strategies import VeRA
from strategies.against_peft import output, parity_of
from strategies.small import stirred

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = {
    "bert": ["query", "intermediate.dense"],
    "roberta": ["query", "value"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "t5": ["q", "v"],
    "vit": ["q_proj", "fc2"],
}
ENDINGS = {f"vera_{name}.default": f"deltas.default.{name}" for name in ("lambda_b", "lambda_d")}


def parity(architecture: str) -> dict[str, float]:
    targets = TARGETS[architecture]
    theirs = VeraConfig(r=16, target_modules=targets, d_initial=0.3, projection_prng_key=4)
    return parity_of(architecture, VeRA(16, 0.3, target_modules=targets, projection_seed=4), theirs, ENDINGS)


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_hf_peft(name: str) -> None:
    assert max(parity(name).values()) < 1e-5


def test_the_shared_matrices_are_those_of_hf_peft_and_are_shared() -> None:
    theirs = get_peft_model(make("bert"), VeraConfig(r=16, target_modules=TARGETS["bert"]))
    adapter = attach(make("bert"), VeRA(16, target_modules=TARGETS["bert"]))
    shared = [delta.shared for delta in adapter.sites.values()]
    assert all(each is shared[0] for each in shared)
    assert torch.equal(shared[0].A, theirs.base_model.vera_A["default"])
    assert torch.equal(shared[0].B, theirs.base_model.vera_B["default"])


@pytest.mark.parametrize("saved", [True, False])
def test_files_hold_the_matrices_once_or_not_at_all(saved: bool, tmp_path: Path) -> None:
    model, inputs = make("gpt2"), inputs_for("gpt2")
    adapter = stirred(attach(model, VeRA(16, projection_seed=9, save_projection=saved)))
    save_adapter(adapter, tmp_path)
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith((".vera_A", ".vera_B")) for name in names) == (2 if saved else 0)
    fresh = make("gpt2")
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh, inputs), output(model, inputs))


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name: str) -> None:
    model, inputs = make(name), inputs_for(name)
    before = output(model, inputs)
    adapter = attach(model, VeRA(16, target_modules=TARGETS[name]))
    assert torch.allclose(output(model, inputs), before, atol=1e-6)
    stirred(adapter, 1.0)
    apart = output(model, inputs)
    adapter.merge()
    assert torch.allclose(output(model, inputs), apart, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(apart, before, atol=1e-4)


def test_a_rank_of_zero_is_refused() -> None:
    with pytest.raises(UserError, match="rank of at least 1; it is 0"):
        VeRA(rank=0)
