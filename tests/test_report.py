"""The table of what trains, against numbers computed by hand from the sizes of the model."""

import io

import pytest
from rich.console import Console
from torch import nn

from models import CLASSES, VOCABULARY, llama, make
from peftlight.report import Row, rows_of, table_of
from peftlight.strategies import BitFit, Full, LoRA
from peftlight.strategy import Adapter, PEFTStrategy, attach

HIDDEN, LAYERS, INTERMEDIATE, POSITIONS = 32, 2, 64, 40


def adapter_on_bert(strategy: PEFTStrategy, modules_to_train: tuple[str, ...] = ()) -> Adapter:
    return attach(make("bert"), strategy, modules_to_train=modules_to_train)


def test_lora_and_a_head() -> None:
    head = HIDDEN * CLASSES + CLASSES
    one = LAYERS * 8 * (HIDDEN + HIDDEN)  # A and B in each layer
    rows = rows_of(adapter_on_bert(LoRA(rank=8), ("classifier",)))
    assert rows == [
        Row("bert.encoder.layer.*.attention.self.query", LAYERS, "LinearLoRA", one, 4 * one),
        Row("bert.encoder.layer.*.attention.self.value", LAYERS, "LinearLoRA", one, 4 * one),
        Row("classifier", 1, "weight, bias", head, 4 * head),
    ]


def test_lora_with_the_biases_of_its_layers_is_one_row() -> None:
    (row,) = rows_of(adapter_on_bert(LoRA(rank=8, target_modules=["query"], bias="lora_only")))
    parameters = LAYERS * (8 * 2 * HIDDEN + HIDDEN)
    assert sorted(row.trained.split(", ")) == ["LinearLoRA", "bias"]
    assert (row.count, row.parameters, row.size) == (LAYERS, parameters, 4 * parameters)


def test_bitfit() -> None:
    rows = rows_of(adapter_on_bert(BitFit()))
    by_layer = LAYERS * (4 * HIDDEN + INTERMEDIATE + HIDDEN + 2 * HIDDEN)
    outside = HIDDEN + HIDDEN + CLASSES  # after the embeddings, in the pooler, in the head
    assert sum(row.parameters for row in rows) == by_layer + outside
    assert {row.trained for row in rows} == {"bias"}
    assert next(row for row in rows if row.modules.endswith("intermediate.dense")) == Row(
        "bert.encoder.layer.*.intermediate.dense", LAYERS, "bias", LAYERS * INTERMEDIATE, 4 * LAYERS * INTERMEDIATE
    )


def test_full() -> None:
    rows = rows_of(adapter_on_bert(Full()))
    embeddings = (VOCABULARY + POSITIONS + 2) * HIDDEN + 2 * HIDDEN
    layer = 4 * (HIDDEN**2 + HIDDEN) + 2 * HIDDEN * INTERMEDIATE + INTERMEDIATE + HIDDEN + 4 * HIDDEN
    head = HIDDEN**2 + HIDDEN + HIDDEN * CLASSES + CLASSES
    assert sum(row.parameters for row in rows) == embeddings + LAYERS * layer + head


def test_bytes_follow_the_number_format() -> None:
    (row,) = rows_of(attach(make("bert").bfloat16(), LoRA(rank=8, target_modules=["query"])))
    assert row.size == 4 * row.parameters  # the adapter stays in float32
    total = sum(row.size for row in rows_of(attach(llama().bfloat16(), Full())))
    assert total == 2 * sum(p.numel() for p in llama().parameters())


def test_an_adapter_on_the_model_itself_has_a_name() -> None:
    (row,) = rows_of(attach(nn.Linear(4, 3), BitFit()))
    assert row == Row("(the model)", 1, "bias", 3, 12)


def test_only_numbers_of_layers_are_replaced() -> None:
    rows = rows_of(attach(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"fc2": nn.Linear(2, 2)})), BitFit()))
    assert [(row.modules, row.count) for row in rows] == [("*", 1), ("*.fc2", 1)]


@pytest.mark.parametrize("width", [60, 120])
def test_the_table_shows_every_row_and_the_share_of_the_whole(width: int) -> None:
    adapter = adapter_on_bert(LoRA(rank=8), ("classifier",))
    out = io.StringIO()
    Console(file=out, width=width).print(table_of(adapter))
    whole = sum(p.numel() for p in adapter.model.parameters())
    trained = 2 * LAYERS * 8 * 2 * HIDDEN + HIDDEN * CLASSES + CLASSES
    words = "".join(character for character in out.getvalue() if character.isalnum() or character in ".,%*")
    for shown in ("LoRAonBertForSequenceClassification", "1,024", "4.1kB", f"{trained:,}", f"{trained / whole:.2%}"):
        assert shown in words
    if width == 120:
        assert "bert.encoder.layer.*.attention.self.query" in out.getvalue()
        assert f"of {whole:,}" in out.getvalue()
