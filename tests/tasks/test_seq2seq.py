"""Encoder-decoders: loss, scores and generation of padded batches against rows alone, and what is refused."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchmetrics.functional.text import rouge_score
from transformers import BartConfig, BartForConditionalGeneration

from models import VOCABULARY, make
from peftlight.data import InstructionPairs, Instructions, SourceTarget, TextClassification
from peftlight.errors import UserError
from peftlight.strategies import Full, LoRA
from peftlight.tasks import CausalLM, PEFTModule, Seq2Seq
from peftlight.tasks.text_scores import exact_match, rouge_l
from tasks.small import (
    QUIET,
    Batch,
    Row,
    Rows,
    Watch,
    assert_equal_states,
    constant,
    loader,
    numbers,
    quiet_trainer,
    standing_still,
    stirred,
    trained,
)

pytestmark = QUIET

SOURCES, TARGETS = [5, 12, 2, 9, 7, 3], [4, 1, 9, 2, 6, 3]
EOS = 99


def bart() -> nn.Module:
    """A BART, whose positions are learned and whose decoder starts with another token than it is padded with."""
    torch.manual_seed(0)
    parts = {f"{part}_{name}": value for part in ("encoder", "decoder")
             for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()}  # fmt: skip
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=60, pad_token_id=0, bos_token_id=1,
                        eos_token_id=EOS, forced_eos_token_id=None, decoder_start_token_id=2, init_std=0.2, **parts,
                        **rates)  # fmt: skip
    return BartForConditionalGeneration(config).eval()


MODELS = {"t5": lambda: make("t5"), "bart": bart}
START = {"t5": 0, "bart": 2}


def rows() -> list[Row]:
    """Sources and targets of random tokens; each target ends."""
    generator = torch.Generator().manual_seed(3)

    def tokens(length: int) -> Tensor:
        return torch.randint(3, EOS, (length,), generator=generator)

    return [
        {"input_ids": tokens(source), "labels": torch.cat([tokens(target), torch.tensor([EOS])]), "row": number}
        for number, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True))
    ]


def padded(some: list[Row]) -> Batch:
    ids = [row["input_ids"] for row in some]
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence([row["labels"] for row in some], batch_first=True, padding_value=-100),
        "row": torch.tensor([row["row"] for row in some]),
    }


def ready(model: nn.Module, **options: Any) -> Seq2Seq:
    module = Seq2Seq(model, LoRA(rank=2), optimizer=standing_still, lr_scheduler=constant, **options)
    module.configure_model()
    assert module.adapter is not None
    stirred(module.adapter)
    return module


def scores_alone(module: PEFTModule, name: str, row: Row) -> Tensor:
    """The scores of a row's labels without padding, from decoder inputs made by hand."""
    assert module.model is not None
    before = torch.cat([torch.tensor([START[name]]), row["labels"][:-1]])
    return module.model(input_ids=row["input_ids"][None], decoder_input_ids=before[None]).logits[0]


def sum_alone(module: PEFTModule, name: str, some: list[Row]) -> Tensor:
    return torch.stack(
        [
            -F.log_softmax(score, -1)[label]
            for row in some
            for score, label in zip(scores_alone(module, name, row), row["labels"], strict=True)
        ]
    ).sum()


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_scores_its_rows_as_each_alone(name: str) -> None:
    module = ready(MODELS[name]())
    with torch.no_grad():
        logits = module.logits(padded(rows()))
        for row, scores in zip(rows(), logits, strict=True):
            assert torch.allclose(scores[: len(row["labels"])], scores_alone(module, name, row), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("size", "accumulate"), [(1, 6), (2, 3), (6, 1)])
def test_every_split_of_a_step_into_batches_gives_the_gradient_per_label(
    name: str, size: int, accumulate: int, tmp_path: Path
) -> None:
    module, watch = ready(MODELS[name]()), Watch()
    assert module.model is not None
    mean = sum_alone(module, name, rows()) / sum(length + 1 for length in TARGETS)
    parameters = trained(module.model)
    gradients = dict(zip(parameters, torch.autograd.grad(mean, list(parameters.values())), strict=True))
    made = [padded(rows()[start : start + size]) for start in range(0, 6, size)]
    quiet_trainer(tmp_path, [watch], accumulate_grad_batches=accumulate).fit(module, loader(made))
    assert len(watch.gradients) == 1
    assert_equal_states(watch.gradients[0], gradients, rtol=1e-5, atol=1e-5)
    assert watch.logged[0]["train_loss"] == pytest.approx(mean.item(), abs=1e-5)


def written_alone(module: PEFTModule, name: str, row: Row, most: int) -> str:
    """The likeliest token at each step, with neither padding nor a cache, up to the end of the text."""
    assert module.model is not None
    tokens = torch.tensor([START[name]])
    while len(tokens) <= most and tokens[-1] != EOS:
        with torch.no_grad():
            logits = module.model(input_ids=row["input_ids"][None], decoder_input_ids=tokens[None]).logits
        tokens = torch.cat([tokens, logits[0, -1:].argmax(-1)])
    return " ".join(str(int(token)) for token in tokens[1:] if token not in (0, EOS))


def ending_numbers() -> Any:
    tokenizer = numbers()
    tokenizer.eos_token = str(EOS)
    return tokenizer


@pytest.mark.parametrize("name", MODELS)
def test_predict_writes_what_each_source_alone_gives_whatever_the_checkpoint_asks_for(
    name: str, tmp_path: Path
) -> None:
    module = ready(MODELS[name](), max_new_tokens=6)
    settings = {"num_beams": 4, "early_stopping": True, "min_length": 9, "no_repeat_ngram_size": 1, "max_length": 3}
    module.model.generation_config.update(**settings)  # type: ignore[union-attr,operator]
    batch = {key: value for key, value in padded(rows()).items() if key != "labels"}
    parts = quiet_trainer(tmp_path).predict(module, Rows([batch], tokenizer=ending_numbers()))
    assert parts is not None
    assert [record["id"] for record in parts[0]] == list(range(6))
    for row, record in zip(rows(), parts[0], strict=True):
        assert set(record) == {"id", "source", "generated"}
        assert record["source"].split() == [str(int(token)) for token in row["input_ids"]]
        assert record["generated"] == written_alone(module, name, row, 6)
    assert len({record["generated"] for record in parts[0]}) > 1


@pytest.mark.parametrize("generate_rows", [0, 3, None])
@pytest.mark.parametrize("stage", ["val", "test"])
def test_metrics_equal_those_by_hand(stage: str, generate_rows: int | None, tmp_path: Path) -> None:
    module = ready(bart(), generate_rows=generate_rows, max_new_tokens=5)
    some = rows()
    for row in (some[0], some[2], some[5]):  # some answers are right
        text = written_alone(module, "bart", row, 4 if row["row"] else 5)
        row["labels"] = torch.tensor([*map(int, text.split()), EOS])
    scored = some[:generate_rows]
    pairs = [
        (written_alone(module, "bart", row, 5), " ".join(str(int(label)) for label in row["labels"][:-1]))
        for row in scored
    ]
    loss = sum_alone(module, "bart", some).item() / sum(len(row["labels"]) for row in some)
    expected = {f"{stage}_loss": loss, f"{stage}_perplexity": math.exp(loss)}
    if scored:
        rouge = [rouge_score(one, other, rouge_keys="rougeL")["rougeL_fmeasure"].item() for one, other in pairs]
        expected[f"{stage}_exact_match"] = sum(one == other for one, other in pairs) / len(pairs)
        expected[f"{stage}_rouge_l"] = sum(rouge) / len(rouge)
        assert 0 < expected[f"{stage}_exact_match"] < expected[f"{stage}_rouge_l"] < 1
    filler = {**some[4], "labels": torch.full((3,), -100)}  # as where another process has a row more
    made = [padded(some[:2]), padded([filler, *some[2:5]]), padded(some[5:])]
    trainer = quiet_trainer(tmp_path)
    run = getattr(trainer, {"val": "validate", "test": "test"}[stage])
    for _ in range(2):  # each evaluation starts afresh
        (found,) = run(module, Rows(made, tokenizer=ending_numbers()), verbose=False)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("written", "wanted", "score"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # the paper's sentences S2, S3 against S1
        ("the gunman kill police", "police killed the gunman", 2 / 4),
        ("the gunman police killed", "police killed the gunman", 2 / 4),
        ("a b c d e", "a x c", 2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3)),
        ("A b, C!", "a B c", 1.0),
        ("", "a b", 0.0),
        ("a b", "", 0.0),
        ("c d", "a b", 0.0),
        ("Ein schöner Tag", "ein schöner Abend", 2 / 3),
        ("хороший фильм", "очень хороший фильм", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
    ],
)
def test_rouge_l_of_cases_by_hand(written: str, wanted: str, score: float) -> None:
    assert rouge_l(written, wanted) == pytest.approx(score)


def test_rouge_l_is_that_of_torchmetrics_on_english_letters() -> None:
    draw = random.Random(0)
    for _ in range(200):
        one, other = (" ".join(draw.choices(["the", "A", "film,", "x-y", "3.5", "!"], k=draw.randrange(1, 12)))
                      for _ in range(2))  # fmt: skip
        theirs = rouge_score(one, other, rouge_keys="rougeL")["rougeL_fmeasure"].item()
        assert rouge_l(one, other) == pytest.approx(theirs, abs=1e-6)


def test_an_exact_match_forgives_white_space_around_the_text_alone() -> None:
    assert exact_match(" a b\n", "a b") == 1
    assert exact_match("a  b", "a b") == exact_match("A b", "a b") == 0


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """Saves a model with a tokenizer, and returns the folder."""

    def save(model: nn.Module) -> str:
        model.save_pretrained(tmp_path / "base")  # type: ignore[operator]
        numbers().save_pretrained(tmp_path / "base")
        return str(tmp_path / "base")

    return save


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_an_encoder_decoder_is_refused_as_a_causal_language_model(name: str, saved: bool, folder: Any) -> None:
    model = MODELS[name]()
    base = folder(model) if saved else model
    with pytest.raises(UserError, match=rf"is an encoder-decoder \({name}\).*Seq2Seq, on SourceTarget"):
        CausalLM(base, LoRA()).configure_model()


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("gpt2", "decoder: train it with CausalLM"),
        ("llama", "decoder: train it with CausalLM"),
        ("bert", "encoder: train it with SequenceClassification"),
    ],
)
def test_what_is_no_encoder_decoder_is_refused_with_the_nearest_task(
    name: str, task: str, saved: bool, folder: Any
) -> None:
    model = make(name)
    base = folder(model) if saved else model
    with pytest.raises(UserError, match=rf"not an encoder-decoder \({name}\).*{task}"):
        Seq2Seq(base, LoRA()).configure_model()


@pytest.mark.parametrize(
    ("module", "data", "words"),
    [
        (lambda: Seq2Seq(make("t5"), LoRA()), Instructions, "Choose SourceTarget or InstructionPairs as the data, or "
         "CausalLM as the model"),
        (lambda: CausalLM(make("llama"), LoRA()), InstructionPairs, "Choose Instructions, Messages or PlainText as the "
         "data, or Seq2Seq as the model"),
        (lambda: Seq2Seq(make("t5"), LoRA()), TextClassification, "SequenceClassification as the model"),
    ],
)  # fmt: skip
def test_the_data_of_another_task_is_refused(module: Any, data: Any, words: str, tmp_path: Path) -> None:
    """Rows for a decoder hold the answer in the input: an encoder-decoder would learn to copy it."""
    texts: dict[str, Any] = {"source": "sample:sentiment", "columns": {"text": "sentence"}}
    rows = texts if data is TextClassification else {"source": "sample:instructions"}
    with pytest.raises(UserError, match=words):
        quiet_trainer(tmp_path).fit(module(), data(**rows, tokenizer=ending_numbers(), max_length=900))


@pytest.mark.parametrize("options", [{"generate_rows": -1}, {"max_new_tokens": 0}])
def test_options_out_of_range_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        Seq2Seq(make("t5"), LoRA(), **options)


def test_it_learns_to_write_what_the_data_says_and_a_checkpoint_brings_it_back(tmp_path: Path, folder: Any) -> None:
    """From a file to exact answers: reverse three numbers, each row alone in its own words."""
    lines = [{"source": f"{a} {b}", "target": f"{b} {a} {b}"} for a in range(3, 6) for b in range(6, 9)]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps(lines))
    data = SourceTarget(source=str(file), validation_source=str(file), tokenizer=ending_numbers(), batch_size=9)
    base, fast = folder(make("t5")), {"optimizer": lambda p: torch.optim.AdamW(p, lr=0.01), "lr_scheduler": constant}
    module = Seq2Seq(base, Full(), max_new_tokens=8, generate_rows=None, **fast)
    trainer = quiet_trainer(tmp_path, max_epochs=60, check_val_every_n_epoch=60)
    trainer.fit(module, data)
    assert trainer.callback_metrics["val_exact_match"] == trainer.callback_metrics["val_rouge_l"] == 1
    trainer.save_checkpoint(tmp_path / "done.ckpt")
    loaded = Seq2Seq.load_from_checkpoint(tmp_path / "done.ckpt", weights_only=True)
    assert (loaded.max_new_tokens, loaded.generate_rows) == (8, None)
    assert loaded.model is not module.model
    (again,) = quiet_trainer(tmp_path).validate(loaded, data, verbose=False)
    assert again["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss"]), rel=1e-5)
