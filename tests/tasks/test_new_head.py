"""A base whose head was made for other classes: what is said, and what `new_head` puts in its place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForSequenceClassification,
)

from bases import tokenizer
from commands.trained import fitted
from models import make
from peftlight import save_adapter
from peftlight.cli import main
from peftlight.errors import UserError
from peftlight.opened import open_adapters
from peftlight.opening import Opening
from peftlight.paths import heads_of, inside
from peftlight.pretrained import Source
from peftlight.strategies import BitFit, LoRA
from peftlight.tasks import ImageClassification, SequenceClassification, TokenClassification
from peftlight.tasks.classifier import Classifier
from tasks.small import QUIET, Rows, batches, class_rows, quiet_trainer

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")]

SMALL: dict[str, Any] = {"vocab_size": 100, "num_labels": 3, "max_position_embeddings": 40}
BERT: dict[str, Any] = {**SMALL, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                        "intermediate_size": 48}  # fmt: skip
BART: dict[str, Any] = {**SMALL, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
                        "decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": 100, "num_labels": 3, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1,
                      "num_heads": 4, "eos_token_id": 1}  # fmt: skip


_LAST = "classification_head.out_proj"


def bert_with(names: list[str]) -> nn.Module:
    model = make("bert")
    model.config.id2label, model.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}  # type: ignore[union-attr]
    return model


BASES = {
    "bert": (SequenceClassification, lambda: bert_with(["sad", "glad", "mad"]), "classifier"),
    "roberta": (SequenceClassification, lambda: make("roberta"), "classifier.out_proj"),
    "bart": (SequenceClassification, lambda: BartForSequenceClassification(BartConfig(**BART)), _LAST),
    "t5": (SequenceClassification, lambda: T5ForSequenceClassification(T5Config(**T5)), _LAST),
    "tags": (TokenClassification, lambda: BertForTokenClassification(BertConfig(**BERT)), "classifier"),
    "images": (ImageClassification, lambda: make("vit"), "classifier"),
}


def saved(name: str, folder: Path) -> tuple[type[Classifier], str, nn.Module, str]:
    """Its task, its folder, the model, and the head's last layer."""
    task, build, head = BASES[name]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(folder / "base")
    return task, str(folder / "base"), model, head  # type: ignore[return-value]


@pytest.mark.parametrize("name", BASES)
def test_a_head_for_other_classes_is_told_of_and_gives_way_when_told(name: str, tmp_path: Path) -> None:
    task, base, before, head = saved(name, tmp_path)
    known = " (sad, glad, mad)" if name == "bert" else ""
    with pytest.raises(UserError) as raised:
        task(base, LoRA(rank=2), label_names=["no", "yes"]).configure_model()
    said = str(raised.value)
    assert f"has a head for 3 classes{known}, and here are 2 classes (no, yes)" in said
    assert f"{head}.weight is (3, 32) there, (2, 32) here" in said
    assert said.endswith("To put a new one there and train it: --model.new_head true")
    module = task(base, LoRA(rank=2), label_names=["no", "yes"], new_head=True)
    module.configure_model()
    assert module.adapter is not None
    assert module.model is not None
    heads = heads_of(module.model)
    own = {name for name, _ in module.model.named_parameters() if inside(name, heads)}
    assert own
    assert own <= set(module.adapter.parameters())
    assert module.model.get_parameter(f"{head}.weight").shape == (2, 32)
    for key, value in before.state_dict().items():  # each matrix of the head is new, and nothing else is
        if value.dim() > 1:
            assert torch.equal(value, module.model.state_dict()[key]) == (not inside(key, heads)), key


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_head_of_the_right_size_is_drawn_anew_too_as_a_new_model_has_it(name: str, tmp_path: Path) -> None:
    task, base, before, head = saved(name, tmp_path)
    heads = []
    for seed, new in ((0, False), (1, True), (1, True), (2, True)):
        torch.manual_seed(seed)
        module = task(base, LoRA(rank=2), num_labels=3, new_head=new)
        module.configure_model()
        assert module.model is not None
        heads.append(module.model.get_parameter(f"{head}.weight").detach())
    kept, one, same, other = heads
    assert torch.equal(kept, before.get_parameter(f"{head}.weight"))
    assert not torch.equal(one, kept)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert float(one.std()) == pytest.approx(float(kept.std()), rel=0.4)


def test_what_is_no_head_does_not_give_way(tmp_path: Path) -> None:
    _, base, _, _ = saved("bert", tmp_path)
    with pytest.raises(UserError, match=r"made for something else: bert\.embeddings\.position_embeddings.*here\.$"):
        Source(base).load_model("AutoModelForSequenceClassification", new_head=True, max_position_embeddings=20)


def test_a_new_head_that_nothing_would_train_is_refused(tmp_path: Path) -> None:
    _, base, _, _ = saved("bert", tmp_path)
    module = SequenceClassification(base, LoRA(rank=2), num_labels=3, new_head=True, trained_modules=["pooler"])
    with pytest.raises(UserError, match=r"no weights for classifier\.bias, classifier\.weight.*model\.trained_modules"):
        module.configure_model()


def test_a_model_given_as_an_object_gets_one_of_its_own_size_and_is_refused_with_another() -> None:
    model = make("bert")
    before = model.classifier.weight.detach().clone()  # type: ignore[union-attr]
    module = SequenceClassification(model, BitFit(), num_labels=3, new_head=True)
    module.configure_model()
    assert module.adapter is not None
    assert not torch.equal(model.classifier.weight, before)  # type: ignore[union-attr]
    assert "classifier.weight" in module.adapter.parameters()
    with pytest.raises(UserError, match=r"has a head for 3 classes, and here are 2 \(no, yes\): give it with a head"):
        SequenceClassification(make("bert"), LoRA(rank=2), label_names=["no", "yes"]).configure_model()


@pytest.mark.parametrize(
    ("here", "words"),
    [
        (["mad", "sad", "glad"], "same classes in another order, sad, glad, mad, and the data has mad, sad, glad"),
        (["x", "y", "z"], "tells other classes apart (sad, glad, mad), and is trained on from there for x, y, z"),
        (["SAD", "glad", "Mad"], None),
        (["0", "1", "2"], None),
    ],
)
def test_a_head_of_the_right_size_says_whose_classes_it_knows(
    here: list[str], words: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, base, _, _ = saved("bert", tmp_path)
    rows = Rows(batches(class_rows([5, 9], [0, 1]), 2), label_names=here)
    quiet_trainer(tmp_path, max_epochs=1).fit(SequenceClassification(base, LoRA(rank=2)), rows)
    told = [record.getMessage() for record in caplog.records if "--model.new_head true" in record.getMessage()]
    assert len(told) == (0 if words is None else 1)
    assert all(words is not None and words in each for each in told)
    caplog.clear()
    quiet_trainer(tmp_path, max_epochs=1).fit(SequenceClassification(base, LoRA(rank=2), new_head=True), rows)
    assert "--model.new_head" not in caplog.text


def test_hf_peft_reads_the_new_head(tmp_path: Path) -> None:
    _, base, _, _ = saved("bart", tmp_path)
    module = SequenceClassification(base, LoRA(rank=2), label_names=["no", "yes"], new_head=True)
    module.configure_model()
    assert module.adapter is not None
    assert module.model is not None
    generator = torch.Generator().manual_seed(1)
    for parameter in module.adapter.parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapter(module.adapter, tmp_path / "adapter")
    theirs = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, ignore_mismatched_sizes=True)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 2]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        torch.testing.assert_close(theirs(**inputs).logits, module.model.eval()(**inputs).logits)


@pytest.mark.filterwarnings("ignore")
def test_the_commands_use_a_run_with_a_new_head(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**BERT, "vocab_size": 400, "max_position_embeddings": 128}
    BertForSequenceClassification(BertConfig(**sizes, pad_token_id=1)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    run = fitted(tmp_path / "runs", tmp_path / "base", "lora", data__source="sample:sentiment", model__new_head="true")
    opened = open_adapters([str(run)], Opening())
    (name,) = opened.adapters.names
    opened.adapters.use(name)
    assert opened.model.config.num_labels == 2  # type: ignore[union-attr]
    assert main(["evaluate", str(run)]) == 0
    assert main(["inspect", str(run)]) == 0
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, opened.model(**inputs).logits, atol=1e-5, rtol=1e-4)
    assert list(merged.config.id2label.values()) == list(opened.records[name].label_names or ())
