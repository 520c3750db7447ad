"""Which heads are trained by default, how many classes they have, and what happens where a head is missing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    LlamaModel,
    RobertaModel,
)

from models import make
from peftlight.errors import UserError
from peftlight.strategies import BitFit, LoRA
from peftlight.tasks import CausalLM, SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, quiet_trainer, token_rows, trained

pytestmark = QUIET

ROWS = class_rows([5, 9], [0, 1])
SMALL_DISTILBERT = DistilBertConfig(vocab_size=100, dim=32, n_layers=1, n_heads=2, hidden_dim=48, num_labels=3)


def saved(model: nn.Module, folder: Path) -> str:
    model.save_pretrained(folder / "base")  # type: ignore[operator]
    return str(folder / "base")


def modules_beside_the_deltas(module: SequenceClassification) -> set[str]:
    module.configure_model()
    assert module.model is not None
    return {name.rpartition(".")[0] for name in trained(module.model) if ".deltas." not in name}


BACKBONES = {
    "bert": (lambda: BertModel(make("bert").config, add_pooling_layer=False), {"bert.pooler.dense", "classifier"}),
    "bert with a pooler": (lambda: BertModel(make("bert").config), {"classifier"}),
    "roberta": (
        lambda: RobertaModel(make("roberta").config, add_pooling_layer=False),
        {"classifier.dense", "classifier.out_proj"},
    ),
    "distilbert": (lambda: DistilBertModel(SMALL_DISTILBERT), {"pre_classifier", "classifier"}),
    "llama": (lambda: LlamaModel(make("llama").config), {"score"}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_what_no_file_holds_is_trained_whole(name: str, tmp_path: Path) -> None:
    make_backbone, expected = BACKBONES[name]
    module = SequenceClassification(saved(make_backbone(), tmp_path), LoRA(rank=2), num_labels=2)
    assert modules_beside_the_deltas(module) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (lambda: make("bert"), {"classifier"}),
        (lambda: make("roberta"), {"classifier.dense", "classifier.out_proj"}),
        (lambda: make("llama_classifier"), {"score"}),
        (lambda: DistilBertForSequenceClassification(SMALL_DISTILBERT), {"pre_classifier", "classifier"}),
    ],
)
def test_the_head_of_a_model_given_as_an_object_is_trained(model: Any, expected: set[str]) -> None:
    assert modules_beside_the_deltas(SequenceClassification(model(), LoRA(rank=2))) == expected


def test_trained_modules_take_the_place_of_the_default() -> None:
    module = SequenceClassification(make("bert"), LoRA(rank=2), trained_modules=["pooler"])
    assert modules_beside_the_deltas(module) == {"bert.pooler.dense"}


def test_a_new_head_that_is_left_out_of_trained_modules_is_refused(tmp_path: Path) -> None:
    base = saved(BertModel(make("bert").config), tmp_path)
    module = SequenceClassification(base, LoRA(rank=2), num_labels=2, trained_modules=[])
    with pytest.raises(UserError, match=r"head is missing.*classifier\.bias, classifier\.weight.*trained_modules"):
        module.configure_model()


def test_bitfit_trains_biases_and_the_whole_new_head(tmp_path: Path) -> None:
    module = SequenceClassification(saved(BertModel(make("bert").config), tmp_path), BitFit(), num_labels=2)
    module.configure_model()
    assert module.model is not None
    names = set(trained(module.model))
    biases = {name for name, _ in module.model.named_parameters() if name.endswith("bias")}
    assert names == biases | {"classifier.weight"}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: LlamaModel(make("llama").config), r"lm_head\.weight"),
        (lambda: BertModel(make("bert").config), r"cls\.predictions"),
    ],
)
def test_a_language_model_without_its_head_is_refused_before_training(model: Any, words: str, tmp_path: Path) -> None:
    module = CausalLM(saved(model(), tmp_path), LoRA(rank=2))
    with pytest.raises(UserError, match=f"head is missing.*{words}"):
        quiet_trainer(tmp_path).fit(module, Rows(batches(token_rows([5, 8]), 2)))
    with pytest.raises(UserError, match="head is missing"):  # and so it stays, however often it is tried
        quiet_trainer(tmp_path).fit(module, Rows(batches(token_rows([5, 8]), 2)))


def test_a_language_model_whose_head_is_tied_has_one(tmp_path: Path) -> None:
    module = CausalLM(saved(make("gpt2"), tmp_path), LoRA(rank=2))
    module.configure_model()
    assert module.model is not None
    assert all(".deltas." in name for name in trained(module.model))


def test_the_number_of_classes_and_their_names_come_from_the_data(tmp_path: Path) -> None:
    module = SequenceClassification(saved(BertModel(make("bert").config), tmp_path), LoRA(rank=2))
    quiet_trainer(tmp_path).fit(module, Rows(batches(ROWS, 2), label_names=["no", "yes", "both", "none"]))
    assert module.model is not None
    assert module.model.classifier.out_features == 4
    assert module.model.config.id2label == {0: "no", 1: "yes", 2: "both", 3: "none"}
    assert module.label_names == ["no", "yes", "both", "none"]


def test_names_given_for_the_classes_win_over_those_of_the_data(tmp_path: Path) -> None:
    module = SequenceClassification(make("bert"), LoRA(rank=2), label_names=["bad", "fair", "good"])
    quiet_trainer(tmp_path).fit(module, Rows(batches(ROWS, 2), label_names=["0", "1", "2"]))
    assert module.label_names == ["bad", "fair", "good"]


@pytest.mark.parametrize(
    ("options", "found", "words"),
    [
        ({"num_labels": 2}, ["a", "b", "c"], r"The data has 3 classes \(a, b, c\).*num_labels is 2"),
        ({"num_labels": 2, "label_names": ["a", "b", "c"]}, None, r"label_names has 3 classes.*num_labels is 2"),
        ({"label_names": ["b", "a", "c"]}, ["a", "b", "c"], r"order.*a, b, c.*b, a, c"),
    ],
)
def test_classes_that_contradict_each_other_are_refused(
    options: dict[str, Any], found: list[str] | None, words: str, tmp_path: Path
) -> None:
    module = SequenceClassification(saved(BertModel(make("bert").config), tmp_path), LoRA(rank=2), **options)
    with pytest.raises(UserError, match=words):
        quiet_trainer(tmp_path).fit(module, Rows(batches(ROWS, 2), label_names=found))


def test_a_loaded_model_refuses_data_whose_classes_stand_in_another_order(tmp_path: Path) -> None:
    module = SequenceClassification(saved(BertModel(make("bert").config), tmp_path), LoRA(rank=2))
    quiet_trainer(tmp_path).fit(module, Rows(batches(ROWS, 2), label_names=["no", "yes"]))
    with pytest.raises(UserError, match="order"):
        quiet_trainer(tmp_path).test(module, Rows(batches(ROWS, 2), label_names=["yes", "no"]), verbose=False)


def test_a_classifier_of_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    module = SequenceClassification(saved(make("bert"), tmp_path), LoRA(rank=2), num_labels=2)
    with pytest.raises(UserError, match=r"classifier\.(weight|bias)"):
        module.configure_model()


def test_without_any_number_of_classes_it_is_asked_for(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)

    module = SequenceClassification(Bare(), LoRA(rank=2))
    with pytest.raises(UserError, match=r"number of classes is not known.*--model.num_labels"):
        quiet_trainer(tmp_path).fit(module, Rows(batches(ROWS, 2)))


def test_the_same_seed_gives_the_same_new_head(tmp_path: Path) -> None:
    base, heads = saved(BertModel(make("bert").config), tmp_path), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        module = SequenceClassification(base, LoRA(rank=2), num_labels=2)
        module.configure_model()
        heads.append(module.model.classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
