"""Predictions in a file, and those shown at the end of a fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn

from models import make
from peftlight.callbacks import PredictionWriter, ShowPredictions
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM, SequenceClassification
from tasks.small import QUIET, Rows, batches, class_rows, constant, loader, numbers, padded, quiet_trainer, token_rows

pytestmark = QUIET

ROWS = class_rows([5, 9, 4, 12, 3], [0, 1, 2, 1, 0])
NAMES = ["cold", "mïld", "hot"]


def classifier(**options: Any) -> SequenceClassification:
    return SequenceClassification(make("bert", dropout=0.1), LoRA(rank=2), label_names=NAMES, **options)


def test_predictions_are_written_in_the_order_of_their_rows(tmp_path: Path) -> None:
    mixed = [padded([ROWS[3], ROWS[0]]), padded([ROWS[4], ROWS[1], ROWS[2]])]
    trainer = quiet_trainer(tmp_path, [PredictionWriter(tmp_path / "run")])
    returned = trainer.predict(classifier(), loader(mixed))
    assert returned is not None
    text = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8")
    written = [json.loads(line) for line in text.splitlines()]
    assert [record["id"] for record in written] == [0, 1, 2, 3, 4]
    assert written == sorted((record for part in returned for record in part), key=lambda record: record["id"])
    assert "mïld" in text


def test_a_second_predict_does_not_repeat_the_first(tmp_path: Path) -> None:
    trainer, module = quiet_trainer(tmp_path, [PredictionWriter(tmp_path)]), classifier()
    trainer.predict(module, loader(batches(ROWS, 5)))
    trainer.predict(module, loader(batches(ROWS[:2], 2)))
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 2


class Modes(Callback):
    """Notes the modes of all modules when training ends."""

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self.found = {name: module.training for name, module in pl_module.named_modules()}


def test_predictions_are_shown_when_a_fit_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module, before, after = classifier(), Modes(), Modes()
    texts = ["5 6 7", "[/b] 9 [red]", "3 4 8 2 5 9 9"]
    callbacks = [before, ShowPredictions(texts), after]
    quiet_trainer(tmp_path, callbacks).fit(module, Rows(batches(ROWS, 2), NAMES, numbers()))
    shown = capsys.readouterr().out
    assert after.found == before.found
    assert any(after.found.values())
    assert module.model is not None
    for text in texts:
        tokens = torch.tensor([numbers()(text)["input_ids"]])
        with torch.no_grad():
            shares = module.model.eval()(input_ids=tokens).logits[0].softmax(-1)
        (line,) = (line for line in shown.splitlines() if text in line)
        assert NAMES[int(shares.argmax())] in line
        assert f"{float(shares.max()):.1%}" in line


def test_texts_of_different_lengths_are_continued_as_each_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = CausalLM(make("llama"), LoRA(rank=2), max_new_tokens=3)
    texts = ["5 6 7 8 9 10 11 12", "31 7"]
    data = Rows(batches(token_rows([5, 9]), 2), tokenizer=numbers())
    quiet_trainer(tmp_path, [ShowPredictions(texts)]).fit(module, data)
    shown = capsys.readouterr().out
    assert module.model is not None
    for text in texts:
        tokens = torch.tensor(numbers()(text)["input_ids"])
        for _ in range(3):
            with torch.no_grad():
                tokens = torch.cat([tokens, module.model.eval()(input_ids=tokens[None]).logits[0, -1:].argmax(-1)])
        (line,) = (line for line in shown.splitlines() if f" {text} " in line)
        assert " ".join(str(int(token)) for token in tokens[-3:]) in line


def test_predictions_are_shown_without_a_data_module_and_in_mixed_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("bert").save_pretrained(tmp_path / "base")
    numbers().save_pretrained(tmp_path / "base")
    module = SequenceClassification(
        str(tmp_path / "base"), LoRA(rank=2), label_names=NAMES, dtype="bfloat16", lr_scheduler=constant
    )
    trainer = quiet_trainer(tmp_path, [ShowPredictions(["5 6 7"])], precision="bf16-mixed")
    trainer.fit(module, loader(batches(ROWS, 2)))
    assert "5 6 7" in capsys.readouterr().out
