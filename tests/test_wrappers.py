"""Models that torch.compile and others have wrapped: seen through, or refused by name before anything is changed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.utils import parametrizations

from models import inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.adapters import Adapters
from peftlight.errors import UserError
from peftlight.strategies import IA3, BitFit, Full, LoRA
from peftlight.strategy import PEFTStrategy, adapters_on
from peftlight.tasks import SequenceClassification
from peftlight.testing import check_strategy
from strategies.small import stirred
from tasks.small import QUIET, batches, class_rows, loader, quiet_trainer

pytestmark = QUIET
HEAD = {"modules_to_train": ["classifier"]}


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**{key: value for key, value in inputs_for("bert").items() if key != "labels"}).logits
    return found


def wrapped(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def layers_in_place(model: nn.Module) -> nn.Module:
    for layer in model.bert.encoder.layer:
        layer.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [wrapped, in_place, layers_in_place])
def test_what_was_compiled_computes_with_the_adapter_and_its_files_are_those_of_the_plain_model(
    compiled: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    base, plain = logits(make("bert")), make("bert")
    save_adapter(stirred(attach(plain, LoRA(rank=2), **HEAD)), tmp_path / "plain")
    expected = logits(plain)
    model = make("bert")
    handle = compiled(model)
    assert torch.equal(logits(handle), base)
    adapter = stirred(attach(handle, LoRA(rank=2), **HEAD))
    assert adapter.model is model
    assert torch.equal(logits(handle), expected)
    save_adapter(adapter, tmp_path / "compiled")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("compiled", "plain"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    with adapter.disabled():
        assert torch.equal(logits(handle), base)
    adapter.merge()
    torch.testing.assert_close(logits(handle), expected, rtol=1e-4, atol=1e-4)
    adapter.remove()
    assert torch.equal(logits(handle), base)
    again = load_adapter(handle, tmp_path / "plain")
    assert torch.equal(logits(handle), expected)
    again.remove()


def test_several_adapters_share_a_compiled_base_and_a_batch() -> None:
    torch._dynamo.reset()
    model = make("bert")
    handle = wrapped(model)
    adapters, alone = Adapters(handle), {None: logits(handle)}
    assert adapters.model is model
    for amount, name in enumerate("ab", 1):
        adapters.attach(LoRA(rank=2), name)
        adapters.use(name)
        stirred(adapters[name], 0.1 * amount)
        alone[name] = logits(handle)
    adapters.use()
    names = ["a", None, "b", "a"]
    with adapters.rows(names):
        together = logits(handle)
    for row, name in enumerate(names):
        torch.testing.assert_close(together[row], alone[name][row], rtol=1e-5, atol=1e-5)
    assert not torch.equal(alone["a"], alone["b"])
    assert torch.equal(logits(handle), alone[None])


class _Compiles(SequenceClassification):
    """Compiles its model as many a user's module does."""

    def configure_model(self) -> None:
        super().configure_model()
        if not isinstance(self.model, OptimizedModule):
            self.model = wrapped(self.model)  # type: ignore[arg-type]


def test_a_training_is_the_same_wherever_it_was_compiled_and_its_checkpoint_has_plain_names(tmp_path: Path) -> None:
    def fitted(kind: type[SequenceClassification], base: nn.Module, outer: Callable[[LightningModule], Any]) -> Any:
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = kind(base, LoRA(rank=2), num_labels=3)
        trainer = quiet_trainer(tmp_path)
        trainer.fit(outer(module), loader(batches(class_rows([5, 7, 4, 6], [0, 1, 2, 0]), 2)))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        again = kind.load_from_checkpoint(tmp_path / "last.ckpt", base_model=make("bert"), weights_only=True)
        assert all(torch.equal(again.adapter.state()[key], value) for key, value in module.adapter.state().items())
        return module.adapter.state(), torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"].keys()

    calls: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        calls.append(1)
        return graph.forward

    expected, keys = fitted(SequenceClassification, make("bert"), lambda module: module)
    compiled = [
        (SequenceClassification, torch.compile(make("bert"), backend=counting), lambda module: module),
        (SequenceClassification, make("bert"), partial(torch.compile, backend=counting)),
        (_Compiles, make("bert"), lambda module: module),
    ]
    for kind, base, outer in compiled:
        state, found = fitted(kind, base, outer)  # type: ignore[arg-type]
        assert found == keys
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)
    assert len(calls) >= 2  # the first two computed compiled


def test_the_promises_hold_for_a_compiled_model() -> None:
    kinds = {"compiled": (lambda: wrapped(make("bert")), inputs_for("bert"))}
    checks = ["starts as it claims", "trains only its own", "comes off", "saves and loads"]
    left_out = {"merges", "resumes", "bfloat16", "gradient checkpointing", "copies", "compiles", "two processes"}
    results = check_strategy(lambda: LoRA(rank=2), kinds, leave_out=left_out)
    assert [(result.check, result.outcome) for result in results] == [(check, "kept") for check in checks]


class FullyShardedDataParallel(nn.Module):
    """What stands around a model under the first FSDP, which cannot be made without processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _one_layer_wrapped(model: nn.Module) -> nn.Module:
    model.bert.encoder.layer[1] = wrapped(model.bert.encoder.layer[1])
    return model


def _sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import distribute_module
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        return distribute_module(model, DeviceMesh("cpu", [0, 1]))
    finally:
        torch.distributed.destroy_process_group()


WRONG: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "data_parallel": (nn.DataParallel, "stands in a DataParallel.*Put the adapter on the model first"),
    "fsdp": (FullyShardedDataParallel, "stands in a FullyShardedDataParallel"),
    "compiled_around": (lambda model: wrapped(nn.DataParallel(model)), "stands in a DataParallel"),
    "one_layer": (_one_layer_wrapped, r"'bert\.encoder\.layer\.1' stands in the wrapper.*module\.compile\(\)"),
    "sharded": (_sharded, "is sharded over processes already.*Put the adapter on the model first"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_other_wrappers_are_refused_by_name(kind: str) -> None:
    wrap, message = WRONG[kind]
    model = wrap(make("bert"))
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=message):
        attach(model, LoRA(rank=2))
    with pytest.raises(UserError, match=message):
        Adapters(model)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert adapters_on(model) == []


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_script_is_refused() -> None:
    with pytest.raises(UserError, match=r"compiled by torch\.jit"):
        attach(torch.jit.script(nn.Sequential(nn.Linear(4, 4))), LoRA(rank=2, target_modules=["0"]))


def test_a_head_that_is_wrapped_after_attaching_is_not_left_out_of_the_files(tmp_path: Path) -> None:
    model = make("bert")
    adapter = attach(model, LoRA(rank=2), **HEAD)
    head = model.classifier
    model.classifier = wrapped(head)  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"'classifier' stands in the wrapper"):
        save_adapter(adapter, tmp_path)
    with pytest.raises(UserError, match=r"'classifier' stands in the wrapper"):
        adapter.parameters()
    model.classifier = head
    model.classifier.compile(backend="eager")  # what the message says
    save_adapter(adapter, tmp_path)


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.orthogonal])
@pytest.mark.parametrize(
    "strategy",
    [LoRA(rank=2, target_modules=["0"]), LoRA(rank=2, use_dora=True, target_modules=["0"]),
     LoRA(rank=2, init_lora_weights="pissa", target_modules=["0"]), IA3(target_modules=["0"], feedforward_modules=[]),
     BitFit(), Full()],
    ids=["lora", "dora", "pissa", "ia3", "bitfit", "full"],
)  # fmt: skip
def test_a_weight_that_is_computed_takes_adapters_and_no_merge(
    strategy: PEFTStrategy, parametrize: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(parametrize(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3))

    x, model = torch.randn(5, 4), made()
    before = model(x)
    adapter = attach(model, strategy, keep_base=True)
    torch.testing.assert_close(model(x), before)
    stirred(adapter)
    expected = model(x)
    assert not torch.allclose(expected, before)
    save_adapter(adapter, tmp_path)
    again = made()
    load_adapter(again, tmp_path)
    torch.testing.assert_close(again(x), expected)
    if adapter.sites:
        with pytest.raises(UserError, match="has no weight to fold into"):
            adapter.merge()
    adapter.remove()
    assert torch.equal(model(x), before)
