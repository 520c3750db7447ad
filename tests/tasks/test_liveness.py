"""After every fit an audit: gradients, movement, the frozen base; and what else a strategy asks of the training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2ForImageClassification

from models import inputs_for, make
from peftlight import Adapter, PEFTStrategy, attach, load_adapter, save_adapter
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.liveness import Liveness
from peftlight.strategies import IA3, BitFit, Full, LoRA
from peftlight.tasks import ImageClassification, SequenceClassification
from tasks.small import QUIET, batches, class_rows, constant, loader, quiet_trainer, trained

pytestmark = QUIET
LABELS = [0, 1, 2, 0]


def fitted(
    strategy: PEFTStrategy, folder: Path, callbacks: Sequence[Callback] = (), **options: Any
) -> SequenceClassification:
    module = SequenceClassification(make("bert"), strategy, num_labels=3, **options)
    torch.manual_seed(0)
    rows = batches(class_rows([5, 7, 4, 6], LABELS), 2)
    quiet_trainer(folder, callbacks, max_epochs=3).fit(module, loader(rows))
    return module


def test_the_audit_of_a_sound_training(tmp_path: Path) -> None:
    module = fitted(LoRA(rank=2), tmp_path)
    assert {tensor.name for tensor in module.verdict.trained} == set(trained(module.model))
    assert all(tensor.had_gradient and tensor.moved for tensor in module.verdict.trained)
    assert module.verdict.still == []
    assert "trained tensors moved, the frozen base is unchanged" in str(module.verdict)
    assert len(module.verdict.base_checksum) == 16
    assert fitted(BitFit(), tmp_path).verdict.base_checksum != module.verdict.base_checksum  # another base is frozen
    assert fitted(LoRA(rank=2), tmp_path).verdict.base_checksum == module.verdict.base_checksum


class _Scale(Delta):
    def __init__(self, dead: bool) -> None:
        super().__init__()
        self.l = nn.Parameter(torch.ones(32))
        if dead:
            self.dead = nn.Parameter(torch.ones(32))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        y: Tensor = base(x)
        return y * self.l


@dataclass
class _Scaled(PEFTStrategy):
    dead: bool = False

    def deltas(self, model: nn.Module) -> list[tuple[str, Delta]]:
        return [("bert.encoder.layer.0.output.dense", _Scale(self.dead))]

    def learning_rates(self, adapter: Adapter) -> dict[str, float]:
        return {name: 0.0 for name in adapter.parameters() if ".deltas." in name}


def test_a_tensor_without_a_gradient_ends_the_run_at_its_first_step(tmp_path: Path) -> None:
    counted = _Count()
    with pytest.raises(UserError, match=r"1 of 4 trained tensors had no gradient .*output.dense.deltas.default.dead"):
        fitted(_Scaled(dead=True), tmp_path, [counted])
    assert counted.steps == 0


class _Routed(nn.Module):
    """Two experts, of which the second is needed from the third batch on, and a parameter that no forward reads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(100, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.unread = nn.Parameter(torch.ones(8))
        self.calls = 0

    def forward(self, input_ids: Tensor, **_: Tensor) -> Tensor:
        self.calls += 1
        scores: Tensor = self.head(self.experts[int(self.calls > 2)](self.embedding(input_ids).mean(1)))
        return scores


def routed(strategy: PEFTStrategy, folder: Path) -> SequenceClassification:
    module = SequenceClassification(_Routed(), strategy, num_labels=3)
    quiet_trainer(folder, max_epochs=3).fit(module, loader(batches(class_rows([5, 7, 4, 6], LABELS), 2)))
    return module


SECOND = {"experts.1.weight", "experts.1.bias"}


@pytest.mark.parametrize("strategy", [Full(), BitFit()], ids=["Full", "BitFit"])
def test_what_only_a_later_step_reaches_trains_from_then_on(
    strategy: PEFTStrategy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = routed(strategy, tmp_path)
    found = {tensor.name: tensor for tensor in module.verdict.trained}
    for name in SECOND & found.keys():
        assert name in caplog.text
        assert (found[name].had_gradient, found[name].moved) == (True, True)
    assert module.verdict.still == (["unread"] if isinstance(strategy, Full) else [])
    assert "had no gradient in the first step" in caplog.text
    assert "They stay as they are, unless a later step reaches them" in caplog.text


def test_what_all_linear_finds_may_wait_too_and_what_is_named_may_not(tmp_path: Path) -> None:
    module = routed(LoRA(rank=2, target_modules="all-linear"), tmp_path)
    assert module.verdict.still == []
    options = r"\(target_modules, exclude_modules, layers, modules_to_save\)"
    with pytest.raises(UserError, match=rf"2 of 6 trained.*experts\.1.*Leave their modules out {options}"):
        routed(LoRA(rank=2, target_modules=["experts.0", "experts.1"], modules_to_save=["head"]), tmp_path)
    routed(LoRA(rank=2, target_modules=["experts.0"], modules_to_save=["head"]), tmp_path)  # as it says
    few: dict[str, Any] = {"target_modules": r"experts\..", "exclude_modules": ["experts.1"]}
    routed(LoRA(rank=2, **few, modules_to_save=["head"]), tmp_path)


def test_advice_names_only_options_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="_Scaled has no option that leaves them out: choose another strategy"):
        fitted(_Scaled(dead=True), tmp_path)
    module = SequenceClassification(_Routed(), LoRA(rank=2, target_modules=["experts.0"]), num_labels=3,
                                    trained_modules=["experts.1"])  # fmt: skip
    rows = loader(batches(class_rows([5, 7, 4, 6], LABELS), 2))
    with pytest.raises(UserError, match=r"2 of 4 trained.*experts\.1\.weight.*, trained_modules\)"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, rows)


def test_a_mask_token_that_no_forward_reads_does_not_end_full_fine_tuning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    make_model = lambda: Dinov2ForImageClassification(Dinov2Config(**sizes, patch_size=8, num_labels=3))  # noqa: E731
    torch.manual_seed(0)
    model = make_model()
    inputs = {key: value[:2] for key, value in inputs_for("vit").items()}
    module = ImageClassification(model, Full(), num_labels=3)
    quiet_trainer(tmp_path, max_epochs=2).fit(module, loader([inputs]))
    assert module.verdict.still == ["dinov2.embeddings.mask_token"]
    assert "dinov2.embeddings.mask_token. They stay as they are" in caplog.text
    save_adapter(module.adapter, tmp_path / "saved")
    fresh = make_model()
    load_adapter(fresh, tmp_path / "saved")
    inputs.pop("labels")
    torch.testing.assert_close(fresh.eval()(**inputs).logits, model.eval()(**inputs).logits)


class _LetGo(SequenceClassification):
    """Computes its loss past the gradient."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        loss, labels = super().loss(batch)
        return loss.detach(), labels


def test_a_loss_without_a_gradient_is_refused(tmp_path: Path) -> None:
    module = _LetGo(make("bert"), LoRA(rank=2), num_labels=3)
    with pytest.raises(UserError, match=r"does not depend on anything that trains.*_LetGo.loss lets go of it"):
        quiet_trainer(tmp_path).fit(module, loader(batches(class_rows([5, 7], [0, 1]), 2)))


def test_a_tensor_that_stays_where_it_was_is_named(tmp_path: Path) -> None:
    verdict = fitted(_Scaled(), tmp_path).verdict
    assert verdict.still == ["bert.encoder.layer.0.output.dense.deltas.default.l"]
    assert "2 of 3 trained tensors moved" in str(verdict)
    assert "where they started: bert.encoder.layer.0.output.dense.deltas.default.l" in str(verdict)


def test_a_tensor_in_which_most_entries_stay_is_named_with_how_many_moved(tmp_path: Path) -> None:
    class Few(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            pl_module.model.classifier.weight.grad[:, 5:] = 0  # of 32 columns

    optimizer = partial(torch.optim.SGD, lr=0.1)
    verdict = fitted(LoRA(rank=2), tmp_path, [Few()], optimizer=optimizer, lr_scheduler=constant).verdict
    (head,) = (each for each in verdict.trained if each.name == "classifier.weight")
    assert (head.moved, head.moved_entries, head.entries) == (True, 15, 96)
    assert verdict.hardly_moved == [head]
    assert "most entries are where they started in: classifier.weight (15 of 96)" in str(verdict)


def test_of_a_large_tensor_a_bounded_number_of_entries_is_kept() -> None:
    model = nn.Sequential(nn.Linear(600, 700))
    watch = Liveness(attach(model, Full()))
    with torch.no_grad():
        model[0].weight[:350] += 1.0  # half of the rows
    weight, bias = watch.verdict().trained
    assert (weight.entries, bias.entries) == (1 << 16, 700)
    assert weight.moved
    assert weight.moved_entries == weight.entries // 2
    assert (bias.moved, bias.moved_entries) == (False, 0)
    assert max(kept.numel() for kept in watch._first_values.values()) == 1 << 16


def test_training_in_bfloat16_alone_is_refused_and_the_advice_trains_in_float32(tmp_path: Path) -> None:
    rows = loader(batches(class_rows([5, 7], [0, 1]), 2))
    module = SequenceClassification(make("bert"), IA3(), num_labels=3)
    with pytest.raises(UserError, match=r"bf16-true, which .*bf16-mixed --model.dtype bfloat16"):
        quiet_trainer(tmp_path, precision="bf16-true").fit(module, rows)
    make("bert").save_pretrained(tmp_path / "base")
    module = SequenceClassification(str(tmp_path / "base"), IA3(), num_labels=3, dtype="bfloat16")
    quiet_trainer(tmp_path, precision="bf16-mixed").fit(module, rows)
    assert {parameter.dtype for parameter in module.adapter.parameters().values()} == {torch.float32}
    assert {p.dtype for p in module.model.bert.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(each.moved_entries == each.entries for each in module.verdict.trained)


class _Count(Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps += 1


class _Spoil(Callback):
    """Writes one value of the frozen base."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        with torch.no_grad():
            pl_module.model.bert.encoder.layer[1].intermediate.dense.weight[3, 4] += 1e-6


def test_a_frozen_weight_that_changed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"frozen base changed .*bert.encoder.layer.1.intermediate.dense.weight"):
        fitted(LoRA(rank=2), tmp_path, [_Spoil()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
def test_any_change_of_one_value_changes_the_checksum(dtype: torch.dtype) -> None:
    frozen = nn.Parameter(torch.arange(30).to(dtype), requires_grad=False)
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_parameter("frozen", frozen)
    adapter = attach(model, LoRA(rank=1, target_modules=["0"]))
    for position in (0, 17, 29):
        watch = Liveness(adapter)
        watch.verdict()
        frozen.data[position] += 1
        with pytest.raises(UserError, match="frozen"):
            watch.verdict()
    swapped = Liveness(adapter)
    frozen.data[[3, 9]] = frozen.data[[9, 3]]
    with pytest.raises(UserError, match="frozen"):
        swapped.verdict()


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    plain, again = fitted(LoRA(rank=2), tmp_path), fitted(LoRA(rank=2), tmp_path, gradient_checkpointing=True)
    assert again.model.is_activation_checkpointing
    for name, value in trained(plain.model).items():
        assert torch.allclose(trained(again.model)[name], value, atol=1e-6), name


def test_gradient_checkpointing_of_a_plain_module_is_refused(tmp_path: Path) -> None:
    module = SequenceClassification(nn.Sequential(nn.Linear(2, 2)), LoRA(rank=1, target_modules=["0"]), num_labels=2,
                                    gradient_checkpointing=True)  # fmt: skip
    with pytest.raises(UserError, match="Gradient checkpointing was asked for, but Sequential does not offer it"):
        module.configure_model()


def test_the_strategys_factors_reach_the_optimizer(tmp_path: Path) -> None:
    module = SequenceClassification(make("bert"), LoRA(rank=2, lora_plus_ratio=16.0), num_labels=3)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(batches(class_rows([5, 7, 4, 6], LABELS), 2)))
    names = {id(parameter): name for name, parameter in trained(module.model).items()}
    rates = {names[id(p)].rpartition(".")[2]: group["initial_lr"] for group in trainer.optimizers[0].param_groups
             for p in group["params"]}  # fmt: skip
    assert rates["B"] == 16 * rates["A"] == 16 * rates["weight"]
