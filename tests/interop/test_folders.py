"""Where an adapter is looked for, what a pickle in its place may do, and what a failed save leaves behind."""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from interop.mutations import CONFIG, MARKER, ORIGIN, PICKLE, TENSORS, Payload
from models import inputs_for, make
from peftlight import attach, load_adapter, save_adapter
from peftlight.errors import UserError
from peftlight.interop import convert_pickle, read_record
from peftlight.strategies import LoRA
from strategies.against_peft import output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A LoRA's folder."""
    adapter = attach(make("bert"), LoRA(rank=4), modules_to_train=["classifier"])
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(adapter, tmp_path / "adapter")
    return tmp_path / "adapter"


def computed(folder: Path, **options: Any) -> torch.Tensor:
    return output(load_adapter(make("bert"), folder, **options).model, inputs_for("bert"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_pickle(folder: Path, value: Any = None) -> None:
    """The folder as `save_pretrained(safe_serialization=False)` leaves it."""
    torch.save(load_file(folder / TENSORS) if value is None else value, folder / PICKLE)
    (folder / TENSORS).unlink()
    (folder / ORIGIN).unlink()


def test_the_folder_of_a_run_will_do(folder: Path) -> None:
    (folder.parent / "checkpoints").mkdir()
    assert torch.equal(computed(folder.parent), computed(folder))
    assert read_record(folder.parent) == read_record(folder)


def test_adapters_in_sub_folders_are_listed(folder: Path) -> None:
    """HF PEFT puts an adapter with a name of its own into a folder of that name."""
    shutil.copytree(folder, folder.parent / "french")
    message = r"has adapters in sub-folders: adapter, french\. Name one"
    for read in (computed, read_record):
        with pytest.raises(UserError, match=message):
            read(folder.parent)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="sub-folders: french"):
        computed(folder.parent)


def test_a_file_is_not_a_folder(folder: Path) -> None:
    with pytest.raises(UserError, match="It is a file; expected a folder"):
        computed(folder / TENSORS)


def test_tensors_in_parts_are_refused(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model-00001-of-00002.safetensors")
    (folder / f"{TENSORS}.index.json").write_text("{}")
    with pytest.raises(UserError, match="in several parts"):
        computed(folder)


def test_a_pickle_is_read_only_when_asked_for(folder: Path) -> None:
    expected = computed(folder)
    as_pickle(folder)
    before = contents(folder)
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle.*convert_pickle=True"):
        computed(folder)
    assert torch.equal(computed(folder, convert_pickle=True), expected)
    assert contents(folder) == before


def test_a_pickle_is_converted(folder: Path) -> None:
    expected, tensors = computed(folder), load_file(folder / TENSORS)
    as_pickle(folder)
    before = contents(folder)
    assert convert_pickle(folder) == folder / TENSORS
    assert torch.equal(computed(folder), expected)
    found = load_file(folder / TENSORS)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(value, found[key]) for key, value in tensors.items())
    assert {**before, TENSORS: (folder / TENSORS).read_bytes()} == contents(folder)
    with pytest.raises(UserError, match=r"has adapter_model\.safetensors already"):
        convert_pickle(folder)


def test_nothing_in_a_pickle_runs(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    as_pickle(folder, {**tensors, "x": Payload(folder)})
    for content in (None, pickle.dumps(Payload(folder)), b"", b"garbage"):
        if content is not None:
            (folder / PICKLE).write_bytes(content)
        before = contents(folder)
        for read in (lambda: computed(folder, convert_pickle=True), lambda: convert_pickle(folder)):
            with pytest.raises(UserError, match=r"adapter_model\.bin is damaged, or holds more than tensors"):
                read()
        assert contents(folder) == before
    assert not (folder / MARKER).exists()
    os.mkdir(folder / MARKER)  # what the payload would have done
    assert (folder / MARKER).exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "holds a list; expected tensors by their names"),
        ({"a": 1}, "expected tensors by their names"),
        ({1: torch.ones(1)}, "expected tensors by their names"),
        ({"a": torch.ones(2, 2).to_sparse()}, "sparse or quantized tensors: a"),
        ({"a": torch.tensor([float("nan")])}, "not finite"),
    ],
)
def test_a_pickle_of_something_else(value: Any, message: str, folder: Path) -> None:
    as_pickle(folder, value)
    with pytest.raises(UserError, match=message):
        computed(folder, convert_pickle=True)


def test_no_pickle_to_convert(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no adapter_model\.bin"):
        convert_pickle(folder.parent)


def test_a_file_where_the_folder_should_be_stays(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(UserError, match="Cannot write"):
        save_adapter(attach(make("bert"), LoRA(rank=4)), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only_stays(folder: Path) -> None:
    before = contents(folder)
    folder.chmod(0o500)
    try:
        with pytest.raises(UserError, match="Cannot write"):
            save_adapter(attach(make("bert"), LoRA(rank=2)), folder)
        assert contents(folder) == before
    finally:
        folder.chmod(0o700)


@pytest.mark.parametrize("file", [CONFIG, TENSORS, ORIGIN])
def test_a_write_that_fails_leaves_the_earlier_adapter(
    file: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file in turn cannot be flushed to the disk; none of the three has been replaced then."""
    before, flush = contents(folder), os.fsync

    def failing(descriptor: int) -> None:
        if file in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise PermissionError(13, "Permission denied")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(UserError, match=r"Permission denied.*unchanged"):
        save_adapter(attach(make("bert"), LoRA(rank=2)), folder)
    assert contents(folder) == before
