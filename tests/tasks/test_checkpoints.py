"""From a notebook: fit without the command line, and checkpoints that load by themselves and hold what was trained."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from transformers import BertModel

from models import make
from peftlight.delta import Base, Delta
from peftlight.errors import UserError
from peftlight.strategies import BitFit, Full, LoRA
from peftlight.strategy import PEFTStrategy
from peftlight.tasks import CausalLM, PEFTModule, SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, loader, padded, quiet_trainer, token_rows, trained

pytestmark = QUIET

ROWS = class_rows([5, 9, 4, 12], [0, 1, 2, 1])
TOKENS = token_rows([5, 9, 4, 12])
NAMES = ["cold", "mild", "hot"]


class Scale(Delta):
    """h = (1 + s) W x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(width))

    def forward(self, base: Base, x: Tensor) -> Tensor:
        return base(x) * (1 + self.s)


@dataclass
class Scaling(PEFTStrategy):
    """A researcher's own strategy: scales what the linear layers of that name give."""

    layer: str = "query"

    def deltas(self, model: nn.Module) -> Iterator[tuple[str, Delta]]:
        for name, module in model.named_modules():
            if name.endswith(self.layer) and isinstance(module, nn.Linear):
                yield name, Scale(module.out_features)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A folder with a pretrained encoder, without a head."""
    torch.manual_seed(0)
    BertModel(make("bert").config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


@pytest.fixture
def writer(tmp_path: Path) -> str:
    """A folder with a pretrained language model."""
    make("llama").save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def fitted(module: PEFTModule, folder: Path) -> Path:
    data = Rows(batches(TOKENS if isinstance(module, CausalLM) else ROWS, 2), label_names=NAMES)
    module.optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=0.01)
    trainer = quiet_trainer(folder, max_epochs=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(folder / "done.ckpt")
    return folder / "done.ckpt"


def scores(module: PEFTModule) -> Tensor:
    assert module.model is not None
    module.model.eval()
    with torch.no_grad():
        return module.logits(padded(ROWS))


STRATEGIES = [LoRA(rank=2, alpha=4), BitFit(), Full(), Scaling(layer="value")]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: type(strategy).__name__)
@pytest.mark.parametrize("weights_only", [None, True])
def test_a_loaded_checkpoint_gives_the_same_outputs(
    strategy: PEFTStrategy, weights_only: bool | None, folder: str, tmp_path: Path
) -> None:
    module = SequenceClassification(folder, strategy)
    path = fitted(module, tmp_path)
    loaded = SequenceClassification.load_from_checkpoint(path, weights_only=weights_only)
    assert torch.equal(scores(loaded), scores(module))
    assert loaded.label_names == NAMES
    assert loaded.strategy == strategy
    assert loaded.model is not module.model


class Weighted(SequenceClassification):
    """A task of the user's, with what it takes handed on."""

    def __init__(self, *args, class_weights: list[float] = [1.0, 1.0], how: object = len, **options) -> None:  # noqa: B006
        super().__init__(*args, **options)
        self.class_weights, self.how = class_weights, how


class Recorded(Weighted):
    """Records all it was given, as Lightning's users do."""

    def __init__(self, base_model, strategy, scale: float = 1.0, **options) -> None:
        super().__init__(base_model, strategy, **options)
        self.scale = scale
        self.save_hyperparameters()


def test_a_task_of_the_users_comes_back_with_its_options(folder: str, tmp_path: Path) -> None:
    module = Weighted(folder, LoRA(rank=2), class_weights=[1.0, 5.0], gradient_checkpointing=False)
    loaded = Weighted.load_from_checkpoint(fitted(module, tmp_path / "weighted"), weights_only=True)
    assert loaded.class_weights == [1.0, 5.0]
    assert torch.equal(scores(loaded), scores(module))
    adamw = functools.partial(torch.optim.AdamW, lr=0.1)
    recorded = Recorded(folder, LoRA(rank=2), scale=2.0, class_weights=[2.0, 1.0], optimizer=adamw)
    again = Recorded.load_from_checkpoint(fitted(recorded, tmp_path / "recorded"), weights_only=True)
    assert (again.scale, again.class_weights) == (2.0, [2.0, 1.0])
    assert torch.equal(scores(again), scores(recorded))


@pytest.mark.parametrize("weights_only", [None, True])
def test_a_loaded_language_model_gives_the_same_outputs(weights_only: bool | None, writer: str, tmp_path: Path) -> None:
    module = CausalLM(writer, LoRA(rank=2), max_new_tokens=5)
    path = fitted(module, tmp_path)
    before = CausalLM(writer, LoRA(rank=2))
    before.configure_model()
    loaded = CausalLM.load_from_checkpoint(path, weights_only=weights_only)
    assert loaded.max_new_tokens == 5
    assert torch.equal(scores(loaded), scores(module))
    assert not torch.equal(scores(before), scores(module))


def test_a_checkpoint_holds_what_was_trained_and_nothing_of_the_frozen_base(folder: str, tmp_path: Path) -> None:
    module = SequenceClassification(folder, LoRA(rank=2))
    path = fitted(module, tmp_path)
    content = torch.load(path, weights_only=True)
    assert module.model is not None
    own = trained(module.model)
    assert {key.removeprefix("model.") for key in content["state_dict"]} == set(own)
    assert all("deltas" in name or "classifier" in name or "pooler" in name for name in own)
    (optimizer,) = content["optimizer_states"]
    assert len(optimizer["state"]) == len(own)
    floats = sum(p.numel() for p in own.values()) * 3  # the parameters and Adam's two means
    assert path.stat().st_size < 4 * floats + 60_000


def test_the_hyperparameters_of_a_checkpoint_are_plain_values(folder: str, tmp_path: Path) -> None:
    path = fitted(SequenceClassification(folder, LoRA(rank=2, target_modules=["query"])), tmp_path)
    found = torch.load(path, weights_only=True)["hyper_parameters"]
    assert found["base_model"] == folder
    assert found["strategy"]["class_path"] == "peftlight.strategies.lora.LoRA"
    assert found["strategy"]["init_args"]["target_modules"] == ["query"]
    assert (found["num_labels"], found["label_names"]) == (3, NAMES)
    assert _is_plain(found)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.classifier.bias"), r"missing from the checkpoint: classifier\.bias"),
        (lambda state: state.update({"model.extra.weight": torch.ones(1)}), r"not part of the model .*extra\.weight"),
        (lambda state: state.update({"model.classifier.bias": torch.ones(7)}), r"classifier\.bias has shape \(7,\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(
    change: Any, words: str, folder: str, tmp_path: Path
) -> None:
    path = fitted(SequenceClassification(folder, LoRA(rank=2)), tmp_path)
    content = torch.load(path, weights_only=True)
    change(content["state_dict"])
    torch.save(content, path)
    with pytest.raises(UserError, match=words):
        SequenceClassification.load_from_checkpoint(path)
    with pytest.raises(UserError, match=words):
        SequenceClassification.load_from_checkpoint(path, strict=False)
    again = SequenceClassification(folder, LoRA(rank=2), num_labels=3)
    with pytest.raises(UserError, match=words):
        quiet_trainer(tmp_path, max_epochs=3).fit(again, loader(batches(ROWS, 2)), ckpt_path=path)


def test_a_checkpoint_of_an_unknown_strategy_is_refused_by_name(folder: str, tmp_path: Path) -> None:
    path = fitted(SequenceClassification(folder, Scaling()), tmp_path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["strategy"]["class_path"] = "their.own.Scalling"
    torch.save(content, path)
    with pytest.raises(UserError, match=r"their\.own\.Scalling is not known.*import its module"):
        SequenceClassification.load_from_checkpoint(path)


def test_a_checkpoint_of_another_size_of_strategy_is_refused(folder: str, tmp_path: Path) -> None:
    path = fitted(SequenceClassification(folder, LoRA(rank=2)), tmp_path)
    with pytest.raises(UserError, match=r"deltas\.default\.A has shape \(2, 32\) in the checkpoint, \(3, 32\)"):
        SequenceClassification.load_from_checkpoint(path, strategy=LoRA(rank=3))


def test_a_base_given_as_an_object_is_given_again_to_load(tmp_path: Path) -> None:
    module = SequenceClassification(make("bert"), LoRA(rank=2))
    path = fitted(module, tmp_path)
    assert torch.load(path, weights_only=True)["hyper_parameters"]["base_model"] is None
    loaded = SequenceClassification.load_from_checkpoint(path, base_model=make("bert"))
    assert torch.equal(scores(loaded), scores(module))
    with pytest.raises(UserError, match=r"load_from_checkpoint\(path, base_model=model\)"):
        SequenceClassification.load_from_checkpoint(path)


def test_a_classifier_on_a_decoder_finds_the_last_token_after_loading(tmp_path: Path) -> None:
    """Such models look for the padding token, which the data's tokenizer knows and the model's config may not."""
    decoder = make("llama_classifier")
    decoder.config.pad_token_id = None
    decoder.save_pretrained(tmp_path / "decoder")
    module = SequenceClassification(str(tmp_path / "decoder"), LoRA(rank=2))
    data = Rows(batches(ROWS, 2), label_names=NAMES, tokenizer=SimpleNamespace(pad_token_id=0))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    loaded = SequenceClassification.load_from_checkpoint(tmp_path / "done.ckpt")
    assert torch.equal(scores(loaded), scores(module))
    with torch.no_grad():
        alone = [loaded.model(input_ids=row["input_ids"][None]).logits[0] for row in ROWS]
    torch.testing.assert_close(scores(loaded), torch.stack(alone))


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(folder: str, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.should_stop = True

    def module() -> SequenceClassification:
        torch.manual_seed(5)
        made = SequenceClassification(folder, LoRA(rank=2), num_labels=3)
        made.configure_model()
        return made

    data, whole, first, second = loader(batches(ROWS, 2)), module(), module(), module()
    quiet_trainer(tmp_path, max_epochs=2).fit(whole, data)
    broken = quiet_trainer(tmp_path, [Stop()], max_epochs=2)
    broken.fit(first, data)
    broken.save_checkpoint(tmp_path / "half.ckpt")
    quiet_trainer(tmp_path, max_epochs=2).fit(second, data, ckpt_path=tmp_path / "half.ckpt")
    for name, value in trained(whole.model).items():
        torch.testing.assert_close(trained(second.model)[name], value, rtol=0, atol=1e-7)
        assert not torch.equal(trained(first.model)[name], value)
