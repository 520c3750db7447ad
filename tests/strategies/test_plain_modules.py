"""Adapters on modules that know nothing of transformers."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from peftlight import Adapter, attach
from peftlight.strategies import BitFit, Full, LoRA
from strategies.against_peft import losses


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.TransformerEncoder(layer, 2)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def convnet() -> nn.Module:
    return nn.Sequential(nn.Conv1d(5, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3))


MODULES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "mlp": (mlp, ["0", "2"]),
    "convnet": (convnet, ["0", "2"]),
    "encoder": (encoder, ["linear1", "linear2"]),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("strategy", ["lora", "bitfit", "full"])
def test_it_trains(name: str, strategy: str) -> None:
    torch.manual_seed(0)
    build, targets = MODULES[name]
    model = build()
    adapter = attach(
        model, {"lora": LoRA(rank=4, target_modules=targets), "bitfit": BitFit(), "full": Full()}[strategy]
    )
    seen = losses(model, list(adapter.parameters().values()), torch.randn(3, 5, 16), steps=15)
    assert seen[-1] < seen[0]
    assert all(p.grad is not None for p in adapter.parameters().values())


def stirred(model: nn.Module, targets: list[str]) -> Adapter:
    torch.manual_seed(2)
    adapter = attach(model, LoRA(rank=4, target_modules=targets))
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return adapter


@pytest.mark.parametrize(("gradients", "masked"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("targets", [["linear1"], ["linear2"], ["layers.1.linear1"]], ids=str)
def test_the_fused_encoder_layer_does_not_pass_the_adapter_by(
    targets: list[str], gradients: bool, masked: bool
) -> None:
    """In eval mode torch computes an encoder layer from its weights, unless something in it has a hook."""
    torch.manual_seed(0)
    model, x = encoder().eval(), torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if masked else None
    adapter = stirred(model, targets)

    def compute() -> Tensor:
        with torch.set_grad_enabled(gradients), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y: Tensor = model(x, src_key_padding_mask=mask)
        return y if mask is None else y.masked_fill(mask[..., None], 0.0)

    evaluated = compute()
    expected = compute_in_training(model, compute)
    assert torch.allclose(evaluated, expected, atol=3e-6)
    with adapter.disabled():
        assert not torch.allclose(compute(), expected, atol=1e-3)
        assert torch.allclose(compute(), compute_in_training(model, compute), atol=3e-6)


def compute_in_training(model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
    model.train()
    y = compute()
    model.eval()
    return y


def test_the_fused_layer_is_used_again_once_the_adapter_is_gone() -> None:
    model, x = encoder().eval(), torch.randn(3, 5, 16)
    stirred(model, ["linear1"]).remove()
    layer = model.get_submodule("layers.0")
    called: list[str] = []
    layer.linear1.forward = lambda x: called.append("linear1")  # type: ignore[assignment, union-attr]
    with torch.no_grad():
        layer(x)
    assert not called


def test_the_output_projection_of_attention_is_refused() -> None:
    """Its weight is used directly, so an adapter there would never be asked."""
    with pytest.raises(Exception, match="uses the weight directly"):
        attach(encoder(), LoRA(target_modules=["out_proj"]))


def test_a_choice_made_for_the_user_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    attach(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), LoRA(rank=2))
    (record,) = [record for record in caplog.records if record.name == "peftlight"]
    assert record.levelname == "WARNING"
    assert "target_modules" in record.getMessage()
