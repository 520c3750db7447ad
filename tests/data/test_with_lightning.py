"""The data modules under the Trainer and under a jsonargparse parser."""

import contextlib
import dataclasses
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from torch.utils.data import SequentialSampler

import peftlight.data
from peftlight.data import SST2, Instructions, TextClassification, TextData

ROWS = [{"text": f"film {place}", "label": place % 2} for place in range(40)]


class Counter(LightningModule):
    """Notes which rows each stage sees; hands out a tokenizer like a model's."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.own_tokenizer = tokenizer
        self.seen: dict[str, list[int]] = {}

    def load_tokenizer(self) -> Any:
        return self.own_tokenizer

    def _note(self, stage: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self.seen.setdefault(stage, []).extend(batch["row"].tolist())
        return self.weight.sum()

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._note("train", batch)

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        self._note("validation", batch)

    def test_step(self, batch: dict[str, torch.Tensor]) -> None:
        self._note("test", batch)

    def predict_step(self, batch: dict[str, torch.Tensor]) -> list[int]:
        self._note("predict", batch)
        return batch["row"].tolist()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*number of training batches")
def test_the_trainer_runs_every_stage_with_the_tokenizer_of_the_model(
    bpe: Callable[..., Any], write: Callable[..., str], tmp_path: Any
) -> None:
    model = Counter(bpe())
    data = TextClassification(source=write("a.json", ROWS), test_source=write("t.json", ROWS[:3]), validation_size=4)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, data)
    assert data.tokenizer is model.own_tokenizer
    assert data.label_names == ["0", "1"]
    assert sorted(model.seen["train"] + model.seen["validation"]) == list(range(40))
    assert len(model.seen["validation"]) == 4
    trainer.validate(model, data, verbose=False)
    trainer.test(model, data, verbose=False)
    assert model.seen["test"] == [0, 1, 2]
    assert trainer.predict(model, data) == [[0, 1, 2]]


def test_only_training_is_shuffled(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    data = TextClassification(source=write("a.json", ROWS), test_source=write("t.json", ROWS), tokenizer=bpe())
    data.setup()
    assert not isinstance(data.train_dataloader().sampler, SequentialSampler)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert isinstance(loader.sampler, SequentialSampler)
    assert not data.train_dataloader().persistent_workers


def test_workers_give_the_same_batches(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    source, tokenizer = write("a.json", ROWS), bpe()
    alone = TextClassification(source=source, tokenizer=tokenizer, validation_size=9)
    helped = TextClassification(source=source, tokenizer=tokenizer, validation_size=9, num_workers=1)
    alone.setup("validate")
    helped.setup("validate")
    for mine, theirs in zip(alone.val_dataloader(), helped.val_dataloader(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def _parser() -> Any:
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser


def test_a_parser_builds_the_module_from_class_path_and_init_args() -> None:
    parser = _parser()
    config = parser.parse_object({"data": {"class_path": "SST2", "init_args": {"batch_size": 4, "validation_size": 9}}})
    data = parser.instantiate(config).data
    assert isinstance(data, SST2)
    assert (data.batch_size, data.max_length, data.labels) == (4, 128, ["negative", "positive"])
    assert data.columns == {"text": "sentence"}
    assert (type(data.validation_size), data.validation_size) == (int, 9)
    again = parser.parse_string(parser.dump(config))
    assert again == config
    short = parser.parse_args(["--data=Instructions", "--data.source=a.json", "--data.columns={output: answer}"])
    assert parser.instantiate(short).data.columns == {"output": "answer"}


@pytest.mark.parametrize("name", sorted(set(peftlight.data.__all__) - {"Summary"}))
def test_every_field_explains_itself_in_the_help(name: str) -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        _parser().parse_args([f"--data.help={name}"])
    text = " ".join(shown.getvalue().split())
    for field in (field.name for field in dataclasses.fields(getattr(peftlight.data, name))):
        assert f"--data.{field} " in text
        option = text.split(f"--data.{field} ")[-1]
        assert len(option.split("(type:")[0].split()) > 4, field  # the first stands for the value


def test_a_family_of_ones_own_is_one_class(bpe: Callable[..., Any], write: Callable[..., str]) -> None:
    """A new data set overrides defaults; a new prompt is a field."""
    from dataclasses import dataclass, field

    @dataclass(eq=False, kw_only=True)
    class Trivia(Instructions):
        columns: dict[str, str] = field(default_factory=lambda: {"instruction": "q", "output": "a"})
        template_without_input: str = "Q: {instruction}\nA: "

    rows = [{"q": "one?", "a": "1"}, {"q": "two?", "a": "2"}]
    data = Trivia(source=write("a.json", rows), tokenizer=bpe(), validation_size=1)
    data.setup("fit")
    texts = {
        data.tokenizer.decode(batch["input_ids"][0])
        for loader in (data.train_dataloader(), data.val_dataloader())
        for batch in loader
    }
    assert texts == {"Q: one?\nA: 1</s>", "Q: two?\nA: 2</s>"}
    assert isinstance(data, TextData)


def test_local_files_need_no_optional_package(
    bpe: Callable[..., Any], write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("datasets", "pyarrow", "pandas", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, name, None)
    data = TextClassification(source=write("a.json", ROWS), tokenizer=bpe())
    data.setup("fit")
    assert len(next(iter(data.train_dataloader()))["labels"]) == 8


def test_importing_the_package_imports_no_heavy_optional_one() -> None:
    code = (
        "import sys, peftlight.data; "
        "print([name for name in ('datasets', 'pyarrow', 'pandas', 'bitsandbytes') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
