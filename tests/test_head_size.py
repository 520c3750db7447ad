"""A head of another size than the base's: layer, config and loss follow when it is switched on, and back."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from peftlight import attach, load_adapter, save_adapter
from peftlight.adapters import Adapters
from peftlight.errors import UserError
from peftlight.strategies import LoRA

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
KINDS = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}
IDS = torch.randint(3, 50, (3, 6), generator=torch.Generator().manual_seed(0))


def classifier(kind: str, labels: list[str]) -> nn.Module:
    torch.manual_seed(0)
    config, model = KINDS[kind]
    names = dict(enumerate(labels))
    given = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
    return model(config(vocab_size=50, **SIZES, **given)).eval()


def saved(kind: str, classes: int, folder: Path) -> nn.Module:
    model = classifier(kind, [f"c{number}" for number in range(classes)])
    save_adapter(attach(model, LoRA(rank=2), modules_to_train=["classifier"]), folder)
    return model


def check(model: nn.Module, classes: int) -> None:
    """See that config, layer and loss have that many classes."""
    head = model.classifier if isinstance(model.classifier, nn.Linear) else model.classifier.out_proj
    assert (model.config.num_labels, model.num_labels, head.out_features, len(head.weight)) == (classes,) * 4
    assert len(model.config.label2id) == classes
    with torch.no_grad():
        if classes == 1:
            found, wanted = model(IDS, labels=torch.tensor([0.5, 1.0, 2.0])), torch.tensor([0.5, 1.0, 2.0])
            expected = F.mse_loss(found.logits[:, 0], wanted)
        else:
            labels = torch.tensor([0, 1, classes - 1])
            found = model(IDS, labels=labels)
            expected = F.cross_entropy(found.logits, labels)
    assert found.logits.shape == (3, classes)
    assert torch.equal(found.loss, expected)


@pytest.mark.parametrize("classes", [4, 1])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_config_and_the_loss_follow_the_adapter_in_use(kind: str, classes: int, tmp_path: Path) -> None:
    theirs = saved(kind, classes, tmp_path)
    adapters = Adapters(classifier(kind, ["yes", "no"]))
    check(adapters.model, 2)
    adapters.load(tmp_path, "other")
    for _ in range(2):
        check(adapters.model, 2)
        assert adapters.model.config.id2label == {0: "yes", 1: "no"}
        adapters.use("other")
        check(adapters.model, classes)
        assert torch.equal(adapters.model(IDS).logits, theirs(IDS).logits)
        adapters.use()
    adapters.use("other")
    adapters.delete("other")
    check(adapters.model, 2)
    assert adapters.model.config.id2label == {0: "yes", 1: "no"}


def test_what_the_config_says_of_the_adapters_classes_is_kept_while_it_is_off(tmp_path: Path) -> None:
    saved("bert", 4, tmp_path)
    adapters = Adapters(classifier("bert", ["yes", "no"]))
    adapters.load(tmp_path, "four")
    adapters.use("four")
    adapters.model.config.id2label = dict(enumerate("wxyz"))
    for name in ("", "four", "", "four"):
        adapters.use(*filter(None, [name]))
        assert list(adapters.model.config.id2label.values()) == (list("wxyz") if name else ["yes", "no"])


def test_an_adapter_loaded_by_itself_tells_its_size_and_a_refused_one_does_not(tmp_path: Path) -> None:
    saved("bert", 4, tmp_path)
    model = classifier("bert", ["yes", "no"])
    model.bert.embeddings.word_embeddings.weight.data.add_(1)
    with pytest.raises(UserError, match="another base"):
        load_adapter(model, tmp_path, own_heads=True)
    check(model, 2)
    adapter = load_adapter(model, tmp_path, own_heads=True, other_base=True)
    check(model, 4)
    adapter.remove()
    check(model, 2)


def test_only_a_heads_size_is_a_number_of_classes() -> None:
    """BERT has as many token types as this base has classes."""
    model = classifier("bert", ["yes", "no"])
    adapter = attach(model, LoRA(rank=2), modules_to_train=["token_type_embeddings"])
    name = next(iter(adapter.originals))
    adapter.originals[name] = torch.zeros(5, 32)
    assert len(model.get_parameter(name)) == model.config.num_labels
    with adapter.disabled():
        assert len(model.get_parameter(name)) == 5
        assert model.config.num_labels == 2


@pytest.mark.parametrize("first_off", [True, False])
@pytest.mark.parametrize(("one", "two"), [(4, 7), (4, 4), (2, 4), (4, 2)])
def test_classes_and_their_names_are_the_bases_whatever_head_is_taken_off_first(
    one: int, two: int, first_off: bool, tmp_path: Path
) -> None:
    model, adapters, named = classifier("bert", ["yes", "no"]), [], []
    for classes in (one, two):
        saved("bert", classes, folder := tmp_path / str(len(adapters)))
        adapters.append(load_adapter(model, folder, f"a{len(adapters)}", own_heads=True))
        if classes != (one if named else 2):
            model.config.id2label = {number: f"{len(adapters)}{number}" for number in range(classes)}
        named.append(dict(model.config.id2label))
    last, kept = (adapters[0], 1) if first_off else (adapters[1], 0)
    last.remove()
    check(model, len(named[kept]))
    assert model.config.id2label == named[kept]
    with adapters[kept].disabled():
        check(model, 2)
        assert model.config.id2label == {0: "yes", 1: "no"}
    assert model.config.id2label == named[kept]
    adapters[kept].remove()
    check(model, 2)
    assert model.config.id2label == {0: "yes", 1: "no"}
