"""What predict gives for each row of both tasks."""

from pathlib import Path

import pytest
import torch

from models import make
from peftlight.strategies import LoRA
from peftlight.tasks import CausalLM, SequenceClassification
from tasks.small import QUIET, Rows, class_rows, loader, numbers, padded, quiet_trainer, stirred, token_rows

pytestmark = QUIET

NAMES = ["cold", "mild", "hot"]


def test_probabilities_of_a_row_sum_to_one_and_belong_to_its_id(tmp_path: Path) -> None:
    rows = class_rows([5, 12, 3, 9, 2], [0] * 5)
    module = SequenceClassification(make("bert"), LoRA(rank=2), label_names=NAMES)
    module.configure_model()
    assert module.adapter is not None
    stirred(module.adapter)
    made = [padded([rows[4], rows[1]]), padded([rows[0], rows[3], rows[2]])]
    parts = quiet_trainer(tmp_path).predict(module, loader(made))
    assert parts is not None
    records = [record for part in parts for record in part]
    assert [record["id"] for record in records] == [4, 1, 0, 3, 2]
    for record in records:
        with torch.no_grad():
            expected = module.model(input_ids=rows[record["id"]]["input_ids"][None]).logits[0].softmax(-1)
        shares = record["probabilities"]
        assert list(shares) == NAMES
        assert sum(shares.values()) == pytest.approx(1)
        assert list(shares.values()) == pytest.approx(expected.tolist(), abs=1e-6)
        assert record["label"] == NAMES[int(expected.argmax())]
        assert record["probability"] == max(shares.values())


def _writer() -> CausalLM:
    module = CausalLM(make("llama"), LoRA(rank=2), max_new_tokens=6)
    module.configure_model()
    assert module.adapter is not None
    stirred(module.adapter)
    module.model.generation_config.eos_token_id = None  # type: ignore[union-attr]  # every row is as long as it may be
    return module


def test_a_left_padded_batch_is_continued_as_each_prompt_alone(tmp_path: Path) -> None:
    rows, module = token_rows([5, 12, 2, 9]), _writer()
    rows[1]["input_ids"][4] = 0  # the padding token within a text is no padding
    batch = {key: value for key, value in padded(rows, left=True).items() if key != "labels"}
    data = Rows([batch], tokenizer=numbers())
    parts = quiet_trainer(tmp_path).predict(module, data)
    assert parts is not None
    assert [record["id"] for record in parts[0]] == [0, 1, 2, 3]
    for row, record in zip(rows, parts[0], strict=True):
        tokens = row["input_ids"]
        for _ in range(6):  # greedily, with neither padding nor a cache
            with torch.no_grad():
                tokens = torch.cat([tokens, module.model(input_ids=tokens[None]).logits[0, -1:].argmax(-1)])
        assert record["prompt"].split() == [str(int(token)) for token in row["input_ids"] if token]
        assert record["completion"].split() == [str(int(token)) for token in tokens[len(row["input_ids"]) :] if token]
    assert len({record["completion"] for record in parts[0]}) > 1


def test_without_a_data_module_the_tokenizer_is_that_of_the_base(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path / "base")
    numbers().save_pretrained(tmp_path / "base")
    rows, module = token_rows([5, 3]), CausalLM(str(tmp_path / "base"), LoRA(rank=2), max_new_tokens=2)
    parts = quiet_trainer(tmp_path).predict(module, loader([padded(rows, left=True)]))
    assert parts is not None
    assert [record["prompt"] for record in parts[0]] == [
        " ".join(str(int(token)) for token in row["input_ids"]) for row in rows
    ]
