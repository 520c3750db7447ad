"""A run's folder belongs to one process at a time, and goes away where nothing was done."""

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peftlight.errors import UserError
from peftlight.run_folder import RunFolder, new_run_folder


def test_every_run_gets_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = [new_run_folder(tmp_path / "runs", "fit-LoRA") for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    for folder in folders:
        folder.leave(nothing_done=False)
        assert folder.path.is_dir()


def test_it_is_held_until_it_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftlight.run_folder._PATIENCE", 0.3)
    held = new_run_folder(tmp_path, "fit")
    with pytest.raises(UserError, match=rf"goes on in another process \(process {os.getpid()} on .*, since .*\)"):
        RunFolder(held.path)
    held.leave(nothing_done=False)
    RunFolder(held.path).leave(nothing_done=True)
    assert held.path.is_dir()  # it was not new then


def test_a_full_disk_is_no_error_of_the_lock(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        RunFolder(tmp_path).leave(nothing_done=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_gone_is_left_without_an_error(tmp_path: Path) -> None:
    folder = new_run_folder(tmp_path, "fit")
    shutil.rmtree(folder.path)
    folder.leave(nothing_done=True)


WORKING = """
import os, sys, time
from pathlib import Path
from peftlight.run_folder import RunFolder

folder = RunFolder(Path(sys.argv[1]))
if not os.fork():
    time.sleep(2)
    os._exit(0)
print("working", flush=True)
time.sleep(60)
"""


def test_the_workers_of_a_killed_process_are_waited_for(tmp_path: Path) -> None:
    """They are forked with the lock, and end some seconds after the process that they work for."""
    with subprocess.Popen([sys.executable, "-c", WORKING, str(tmp_path)], stdout=subprocess.PIPE, text=True) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "working\n"
        killed.kill()
    RunFolder(tmp_path).leave(nothing_done=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "stays"), [("log.txt", False), ("predictions.jsonl", True)])
def test_a_new_one_goes_where_it_holds_nothing_but_what_a_start_writes(tmp_path: Path, name: str, stays: bool) -> None:
    folder = new_run_folder(tmp_path, "fit")
    (folder.path / name).touch()
    folder.leave(nothing_done=True)
    assert folder.path.exists() == stays


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a disk that is not there")
    for root in (tmp_path / "file", tmp_path / "file" / "runs", tmp_path / "link"):
        with pytest.raises(UserError, match=r"cannot be made: .*default_root_dir"):
            new_run_folder(root, "fit")
