"""Checkpoints on the disk: whole or not there, damage found by their bytes, and what plain torch makes of them."""

import os
import resource
import shutil
import signal
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

import forked
from models import make
from peftlight import checkpoint_files
from peftlight.checkpoint_files import AtomicCheckpoints, newest_whole, read_checkpoint, write_checkpoint, written_after
from peftlight.errors import UserError
from peftlight.strategies import LoRA
from peftlight.tasks import SequenceClassification
from tasks.small import QUIET, batches, class_rows, constant, loader, quiet_trainer

pytestmark = QUIET
SEAL = 57
"""Bytes of mark, time and checksum at the end."""
ROWS = batches(class_rows([5, 9, 4, 12], [0, 1, 2, 1]), 2)


def content(step: int = 3) -> dict[str, Any]:
    torch.manual_seed(step)
    return {"state_dict": {"a": torch.randn(40, 50)}, "optimizer_states": [], "global_step": step, "words": ["é", None]}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints" / "last.ckpt"
    write_checkpoint(content(), path)
    return path


def flipped(path: Path, at: int) -> Path:
    """A copy with one bit changed."""
    copy = path.with_name("flipped.ckpt")
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    copy.write_bytes(data)
    return copy


def test_what_is_read_is_what_was_written_and_plain_torch_reads_it_too(path: Path) -> None:
    for found in (read_checkpoint(path), torch.load(path, weights_only=True)):
        assert torch.equal(found["state_dict"].pop("a"), content()["state_dict"].pop("a"))
        assert found == {"state_dict": {}, "optimizer_states": [], "global_step": 3, "words": ["é", None]}
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_every_flipped_bit_in_the_content_is_noticed(path: Path) -> None:
    size = path.stat().st_size
    sealed = size - SEAL
    for at in [*range(0, sealed, max(1, sealed // 60)), sealed - 1, size - 40, size - 1]:
        with pytest.raises(UserError, match=r"flipped\.ckpt is (damaged|no checkpoint)"):
            read_checkpoint(flipped(path, at))


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_a_torn_file_is_noticed(path: Path, part: float) -> None:
    torn = path.with_name("torn.ckpt")
    torn.write_bytes(path.read_bytes()[: int(part * (path.stat().st_size - SEAL))])
    with pytest.raises(UserError, match=r"torn\.ckpt is (damaged|no checkpoint)"):
        read_checkpoint(torn)


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no checkpoint .*nothing\.ckpt"):
        read_checkpoint(tmp_path / "nothing.ckpt")


def test_a_checkpoint_of_plain_lightning_is_read(tmp_path: Path) -> None:
    torch.save(content(), tmp_path / "theirs.ckpt")
    assert read_checkpoint(tmp_path / "theirs.ckpt")["global_step"] == 3


@pytest.mark.parametrize(
    ("value", "named"),
    [(np.zeros(2), "numpy"), (timedelta(1), "datetime.timedelta"), (Path(), "pathlib"), (open, "open")],
)
def test_what_could_not_be_read_again_is_not_written(path: Path, value: Any, named: str) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"(?s)last.ckpt.*{named}"):
        write_checkpoint({**content(), "callbacks": {"mine": value}}, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.ckpt"]


class Runs:
    def __reduce__(self) -> Any:
        return os.mkdir, ("was run",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**content(), "other": Runs()}, tmp_path / "theirs.ckpt")
    with pytest.raises(UserError, match=r"theirs\.ckpt is refused: it holds \w+\.mkdir.*--init_adapter"):
        read_checkpoint(tmp_path / "theirs.ckpt")
    with pytest.raises(UserError, match="weights_only is false"):
        AtomicCheckpoints().load_checkpoint(tmp_path / "theirs.ckpt", weights_only=False)
    assert os.listdir() == ["theirs.ckpt"]


def test_without_room_the_former_checkpoint_stays(path: Path) -> None:
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"No room left to write .*last\.ckpt.*before is unchanged"):
            write_checkpoint(content(4), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["last.ckpt"]


def test_of_a_folder_the_newest_whole_one_is_used_and_the_others_are_told(path: Path) -> None:
    folder = path.parent
    write_checkpoint({"state_dict": {}, "global_step": 4}, folder / "weights.ckpt")
    write_checkpoint(content(5), folder / "epoch=1.ckpt")
    (folder / "epoch=1.ckpt").write_bytes((folder / "epoch=1.ckpt").read_bytes()[:-60])
    found, _, (damaged, weights) = newest_whole(folder)
    assert found == path
    assert damaged.endswith(f"epoch=1.ckpt is no checkpoint, or is damaged. Used instead: {path}")
    assert weights.endswith(f"weights.ckpt holds the weights alone. Used instead: {path}")


def test_the_newest_is_the_one_written_last_also_in_a_copy(path: Path, tmp_path: Path) -> None:
    write_checkpoint(content(1), path.parent / "a.ckpt")  # a run that was taken back to an earlier step
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("a.ckpt", "last.ckpt"):  # the time of the file is now the other way round
        shutil.copyfile(path.parent / name, copy / name)
        os.utime(copy / name, (len(name) * 1e6, len(name) * 1e6))
    assert newest_whole(copy)[0] == copy / "a.ckpt"


def test_the_newest_is_the_one_written_last_also_where_the_clock_was_set_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.time_ns", lambda: 10**18)
    write_checkpoint(content(4), path.parent / "a.ckpt")
    assert newest_whole(path.parent)[0] == path.parent / "a.ckpt"
    assert written_after(path) == [path.parent / "a.ckpt"]


@pytest.mark.parametrize("what", ["folder", "link to nothing", "damaged disk"])
def test_what_cannot_be_read_is_passed_over(path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = path.parent / "new.ckpt"
    checksum = checkpoint_files._checksum

    def fails(file: Any, size: int) -> bytes:
        if file.name == str(other):
            raise OSError(5, "Input/output error")
        return checksum(file, size)

    if what == "folder":
        other.mkdir()
        (other / "part").write_bytes(bytes(SEAL))
    elif what == "link to nothing":
        other.symlink_to("nowhere.ckpt")
    else:
        write_checkpoint(content(4), other)
        monkeypatch.setattr(checkpoint_files, "_checksum", fails)
    found, _, (told,) = newest_whole(path.parent)
    assert found == path
    assert {"damaged disk": "cannot be read: Input/output error"}.get(what, f"There is no checkpoint {other}") in told


def test_a_folder_without_a_whole_one_is_refused(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"nothing in .* from which .*(?s:.*)last\.ckpt is no checkpoint, or"):
        newest_whole(path.parent)
    with pytest.raises(UserError, match="It holds no checkpoint"):
        newest_whole(tmp_path)


def test_a_trainer_writes_and_reads_through_it(tmp_path: Path) -> None:
    def fit(resumed: Path | None, epochs: int) -> Trainer:
        module = SequenceClassification(make("bert"), LoRA(rank=2), lr_scheduler=constant)
        trainer = quiet_trainer(tmp_path, max_epochs=epochs, plugins=[AtomicCheckpoints()])
        trainer.fit(module, loader(ROWS), ckpt_path=resumed)
        return trainer

    path = tmp_path / "one.ckpt"
    fit(None, 1).save_checkpoint(path, weights_only=False)
    assert fit(path, 3).global_step == 6
    with pytest.raises(UserError, match="damaged"):
        fit(flipped(path, 500), 3)


def _write_on(folder: Path) -> None:
    step = 0
    while True:
        step += 1
        write_checkpoint({**content(), "global_step": step, "big": torch.zeros(400_000)}, folder / "last.ckpt")


@pytest.mark.slow
def test_a_writer_that_is_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    for _ in range(10):
        writer = forked._SERVER.Process(target=_write_on, args=(tmp_path,))
        writer.start()
        while not (tmp_path / "last.ckpt").exists() or not list(tmp_path.glob(".*.tmp")):
            pass  # until it is in the middle of a write
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join()
        assert newest_whole(tmp_path)[0] == tmp_path / "last.ckpt"
        for left in tmp_path.glob(".*.tmp"):
            left.unlink()
