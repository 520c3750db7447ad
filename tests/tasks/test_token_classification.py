"""Token classification: its loss, its metrics by hand, its heads, and one tag for each word to predict."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForTokenClassification,
    BertForTokenClassification,
    GPT2ForTokenClassification,
    LlamaForTokenClassification,
    PretrainedConfig,
    RobertaForTokenClassification,
)

from models import make
from peftlight.data import SST2, TaggedWords
from peftlight.errors import UserError
from peftlight.strategies import Full, LoRA
from peftlight.tasks import TokenClassification
from processes.ranks import Ranks
from tasks.small import QUIET, Batch, Row, Rows, class_rows, loader, numbers, padded, quiet_trainer, stirred, trained
from tasks.test_entities import NAMES, by_pattern

pytestmark = QUIET

LENGTHS = [5, 31, 3, 40, 17, 2, 33, 9]


def config_of(name: str) -> PretrainedConfig:
    config = make(name).config
    config.num_labels = len(NAMES)
    return config


def model_of(kind: Any, name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = kind(config_of(name)).eval()
    return model


def tagged_rows(lengths: list[int] = LENGTHS, seed: int = 3) -> list[Row]:
    """Rows of random tokens, each with a random tag, or with none as often as a piece within a word has."""
    rows, generator = class_rows(lengths, [0] * len(lengths), seed), torch.Generator().manual_seed(seed)
    for row in rows:
        count = len(row["input_ids"])
        labels = torch.randint(0, len(NAMES), (count,), generator=generator)
        row["labels"] = labels.masked_fill(torch.rand(count, generator=generator) < 0.3, -100)
    return rows


def uneven(rows: list[Row]) -> list[Batch]:
    return [padded(rows[:1]), padded(rows[1:6]), padded(rows[6:])]


def tagger(names: list[str] = NAMES) -> TokenClassification:
    module = TokenClassification(model_of(BertForTokenClassification, "bert"), LoRA(rank=2), label_names=names)
    module.configure_model()
    assert module.adapter is not None
    stirred(module.adapter)
    return module


def scores_alone(module: TokenClassification, row: Row) -> Tensor:
    """The scores of the row's labelled tokens, the row on its own."""
    with torch.no_grad():
        scores: Tensor = module.model(input_ids=row["input_ids"][None]).logits[0]
    return scores[row["labels"] != -100].double()


def by_hand(module: TokenClassification, rows: list[Row], names: list[str]) -> tuple[list[list[str]], ...]:
    truth = [[names[label] for label in row["labels"].tolist() if label != -100] for row in rows]
    guess = [[names[int(place)] for place in scores_alone(module, row).argmax(-1)] for row in rows]
    return truth, guess


def loss_by_hand(module: TokenClassification, rows: list[Row]) -> float:
    losses = [
        -scores_alone(module, row).log_softmax(-1)[torch.arange(int(known.sum())), row["labels"][known]]
        for row in rows
        if (known := row["labels"] != -100).any()
    ]
    return float(torch.cat(losses).mean())


def accuracy_of(truth: list[list[str]], guess: list[list[str]]) -> float:
    pairs = [pair for rows in zip(truth, guess, strict=True) for pair in zip(*rows, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_of_entities_equal_those_by_hand(stage: str, tmp_path: Path) -> None:
    rows, module = tagged_rows(), tagger()
    truth, guess = by_hand(module, rows, NAMES)
    real, found = ([by_pattern(row) for row in side] for side in (truth, guess))
    hits = sum(len(one & other) for one, other in zip(real, found, strict=True))
    counts = sum(map(len, found)), sum(map(len, real))
    assert hits > 0
    expected = {
        f"{stage}_accuracy": accuracy_of(truth, guess),
        f"{stage}_precision": hits / counts[0],
        f"{stage}_recall": hits / counts[1],
        f"{stage}_f1": 2 * hits / sum(counts),
        f"{stage}_loss": loss_by_hand(module, rows),
    }
    run = getattr(quiet_trainer(tmp_path), {"val": "validate", "test": "test"}[stage])
    for _ in range(2):  # the second time from nothing again
        (logged,) = run(module, loader(uneven(rows)), verbose=False)
        assert logged == pytest.approx(expected, abs=1e-5)


def test_without_entities_f1_is_the_mean_over_the_tags(tmp_path: Path) -> None:
    names = ["NOUN", "VERB", "O", "B-X", "DET"]
    rows, module = tagged_rows(), tagger(names)
    truth, guess = ([tag for row in side for tag in row] for side in by_hand(module, rows, names))
    shares = []
    for name in names:
        hits = sum(one == other == name for one, other in zip(truth, guess, strict=True))
        shares.append(2 * hits / (truth.count(name) + guess.count(name)))
    (logged,) = quiet_trainer(tmp_path).validate(module, loader(uneven(rows)), verbose=False)
    assert set(logged) == {"val_loss", "val_accuracy", "val_f1"}
    assert logged["val_f1"] == pytest.approx(sum(shares) / len(names), abs=1e-5)


def test_the_loss_is_that_of_the_model_and_ignores_what_has_no_tag() -> None:
    module, batch = tagger(), padded(tagged_rows())
    loss_sum, labels = module.loss(batch)
    theirs = module(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}).loss
    assert int(labels) == int((batch["labels"] != -100).sum())
    torch.testing.assert_close(loss_sum / labels, theirs)


def test_a_batch_without_tags_counts_for_nothing(tmp_path: Path) -> None:
    known, unknown = tagged_rows([5, 8]), tagged_rows([7, 3], seed=9)
    for row in unknown:
        row["labels"] = torch.full_like(row["labels"], -100)
    module, trainer = tagger(), quiet_trainer(tmp_path)
    (alone,) = trainer.validate(module, loader([padded(known)]), verbose=False)
    (beside,) = trainer.validate(module, loader([padded(unknown), padded(known)]), verbose=False)
    assert beside == pytest.approx(alone)


KINDS = {
    "bert": (BertForTokenClassification, {"classifier"}),
    "roberta": (RobertaForTokenClassification, {"classifier"}),
    "gpt2": (GPT2ForTokenClassification, {"classifier"}),
    "llama": (LlamaForTokenClassification, {"score"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_new_head_is_trained_whole_whether_loaded_or_given(name: str, tmp_path: Path) -> None:
    kind, expected = KINDS[name]
    given = model_of(kind, name)
    getattr(given, given.base_model_prefix).save_pretrained(tmp_path / "base")
    for module in (
        TokenClassification(given, LoRA(rank=2)),
        TokenClassification(str(tmp_path / "base"), LoRA(rank=2), label_names=NAMES),
    ):
        quiet_trainer(tmp_path, max_steps=1).fit(module, loader(uneven(tagged_rows())))
        assert {parameter.rpartition(".")[0] for parameter in trained(module.model) if ".deltas." not in parameter} \
            == expected  # fmt: skip
    assert isinstance(module.model, type(AutoModelForTokenClassification.from_config(config_of(name))))
    assert module.model.config.id2label == dict(enumerate(NAMES))


def words_of_numbers(write: Callable[[str, str], str], **fields: Any) -> TaggedWords:
    """Words that are numbers: a tag follows from the word alone. Every twelfth word begins an entity of two."""
    sentences = [[str(2 + (7 * row + place) % 90) for place in range(3 + row % 5)] for row in range(40)]
    lines = "\n\n".join("\n".join(f"{word} {tag(int(word))}" for word in words) for words in sentences)
    source = write("a.conll", lines)
    return TaggedWords(source=source, validation_source=source, tokenizer=numbers(), batch_size=8, **fields)


def tag(number: int) -> str:
    return {0: "B-PER", 1: "I-PER", 6: "B-LOC"}.get(number % 12, "O")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_fit_learns_the_tags_and_predict_gives_one_for_each_word(tmp_path: Path, write: Any) -> None:
    model = BertForTokenClassification(make("bert").config)
    model.classifier, model.config.num_labels, model.num_labels = nn.Linear(32, 4), 4, 4
    module = TokenClassification(model, Full(), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    data = words_of_numbers(write, cache_dir=str(tmp_path / "cache"))
    trainer = quiet_trainer(tmp_path, max_epochs=12)
    trainer.fit(module, data)
    assert module.label_names == ["B-LOC", "B-PER", "I-PER", "O"]
    assert trainer.callback_metrics["val_f1"] == 1
    data = words_of_numbers(write, predict_source=write("p.conll", "24\n25\n\n30\n99\n24\n25\n3\n"),
                            cache_dir=str(tmp_path / "cache"), max_length=4)  # fmt: skip
    parts = quiet_trainer(tmp_path).predict(module, data)
    assert parts == [[
        {"id": 0, "words": ["24", "25"], "tags": ["B-PER", "I-PER"]},
        {"id": 1, "words": ["30", "99", "24", "25", "3"], "tags": ["B-LOC", "O", "B-PER", "I-PER", None]},
    ]]  # fmt: skip


def test_rows_without_words_cannot_be_predicted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing says where the words begin.*TaggedWords"):
        quiet_trainer(tmp_path).predict(tagger(), loader([padded(tagged_rows())]))


def test_data_of_another_task_is_refused(tmp_path: Path) -> None:
    data = SST2(source="sample:sentiment", tokenizer=numbers(), cache_dir=str(tmp_path))
    module = TokenClassification(model_of(BertForTokenClassification, "bert"), LoRA(rank=2))
    with pytest.raises(UserError, match=r"SST2 makes the rows of SequenceClassification.*TaggedWords"):
        quiet_trainer(tmp_path).fit(module, data)


def test_tags_in_another_order_are_refused(tmp_path: Path) -> None:
    data = Rows([padded(tagged_rows())], label_names=NAMES[::-1])
    module = TokenClassification(model_of(BertForTokenClassification, "bert"), LoRA(rank=2), label_names=NAMES)
    with pytest.raises(UserError, match="another order"):
        quiet_trainer(tmp_path).fit(module, data)


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path: Path, write: Any) -> None:
    """Every other row is much longer, so that the mean of both processes' own scores is not that of all rows."""
    model_of(BertForTokenClassification, "bert").save_pretrained(tmp_path / "base")
    numbers().save_pretrained(tmp_path / "base")
    draw = random.Random(0)
    rows = [[f"{draw.randrange(2, 99)} {draw.choice(NAMES)}" for _ in range(2 + 26 * (row % 2))] for row in range(16)]
    source = write("a.conll", "\n\n".join("\n".join(row) for row in rows))
    fields = {"source": source, "validation_source": source, "cache_dir": str(tmp_path), "batch_size": 4}
    module = TokenClassification(str(tmp_path / "base"), LoRA(), label_names=NAMES)
    (one,) = quiet_trainer(tmp_path).validate(module, TaggedWords(labels=NAMES, **fields), verbose=False)
    assert 0 < one["val_f1"] < 1
    flags = [f"--data.{name}={value}" for name, value in fields.items()] + [f"--data.labels=[{','.join(NAMES)}]"]
    arguments = ["validate", "--model=TokenClassification", "--model.strategy=LoRA",
                 f"--model.base_model={tmp_path / 'base'}", "--data=TaggedWords", *flags,
                 "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]  # fmt: skip
    ranks = Ranks(2, arguments, tmp_path)
    assert ranks.ended() == [0, 0], ranks.said()
    (run,) = (tmp_path / "runs").iterdir()
    record = json.loads((run / "run.json").read_text())
    assert record["processes"] == 2
    assert record["metrics"] == pytest.approx(one, rel=1e-5)
