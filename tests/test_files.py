"""A file is written whole or not at all."""

import errno
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from peftlight.errors import UserError
from peftlight.files import as_os_error, write_atomically, write_folder, write_text


def test_a_file_is_written_with_the_folders_it_needs(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "c.txt", "grüße\n")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == "grüße\n".encode()
    assert os.listdir(tmp_path / "a" / "b") == ["c.txt"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(("raised", "seen"), [(OSError(28, "No space left"), UserError), (KeyError("x"), KeyError)])
def test_a_failure_while_writing_keeps_the_old_file_and_leaves_nothing_behind(
    raised: Exception, seen: type[Exception], tmp_path: Path
) -> None:
    def fails_half_way(temporary: Path) -> None:
        temporary.write_text("half")
        raise raised

    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(seen):
        write_atomically(tmp_path / "a.txt", fails_half_way)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_old_file_is_there_until_the_new_one_is_whole(tmp_path: Path) -> None:
    def look(temporary: Path) -> None:
        temporary.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"

    (tmp_path / "a.txt").write_text("old")
    with open(tmp_path / "a.txt") as reader:
        write_atomically(tmp_path / "a.txt", look)
        assert reader.read() == "old"  # renamed over, not written over
    assert (tmp_path / "a.txt").read_text() == "new"


def test_links_stay_links_and_pipes_stay_pipes(tmp_path: Path) -> None:
    """As root a device would give way to a file just so."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to("file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "said")
    assert os.read(reader, 10) == b"said"
    assert (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_a_disk_that_cannot_flush_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flush = os.fsync

    def of_files(file: int) -> None:
        if stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(file)

    monkeypatch.setattr(os, "fsync", of_files)
    write_text(tmp_path / "a.txt", "new")
    write_folder(tmp_path / "folder", new_folder)
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "folder"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot write .*file/a\.txt"):
        write_text(tmp_path / "file" / "a.txt", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"Cannot write .*folder"):
        write_text(tmp_path / "folder", "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_full_disk_keeps_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does: in the middle of a write."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    code = f"""
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from peftlight.errors import UserError
from peftlight.files import write_text
path = {str(tmp_path / "a.txt")!r}
write_text(path, "old")
try:
    write_text(path, "x" * 5000)
except UserError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True, check=True)
    assert "No room left to write" in ran.stdout
    assert "unchanged" in ran.stdout
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def new_folder(temporary: Path) -> None:
    (temporary / "inner").mkdir()
    (temporary / "inner" / "file").write_text("new")


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "another folder"])
def test_a_folder_takes_its_name_when_it_is_whole(there: str, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "folder"
    if there != "nothing":
        folder.mkdir(parents=True)
    if there == "another folder":
        (folder / "old").write_text("old")
        with pytest.raises(UserError, match="What was there before is unchanged"):
            write_folder(folder, new_folder)
        assert os.listdir(folder) == ["old"]
    write_folder(folder, new_folder, replace=there == "another folder")
    assert (folder / "inner" / "file").read_text() == "new"
    assert os.listdir(folder) == ["inner"]
    assert os.listdir(tmp_path / "deep") == ["folder"]


def test_what_a_killed_writer_of_the_same_number_left_is_not_in_the_way(tmp_path: Path) -> None:
    """In containers a program has the same number each time."""
    write_folder(tmp_path / "folder", lambda temporary: None)
    for ending in ("tmp", "old"):
        left = tmp_path / f".folder.{os.getpid()}.{ending}"
        left.mkdir()
        new_folder(left)
        (left / "left").touch()
    write_folder(tmp_path / "folder", new_folder, replace=True)
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["inner"]


@pytest.mark.parametrize("raised", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_a_folder_is_kept_when_the_new_one_fails(raised: BaseException, tmp_path: Path) -> None:
    def fails(temporary: Path) -> None:
        new_folder(temporary)
        raise raised

    write_folder(tmp_path / "folder", new_folder)
    with pytest.raises((UserError, KeyboardInterrupt)):
        write_folder(tmp_path / "folder", fails, replace=True)
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_comes_back_if_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "folder", new_folder)
    rename = os.replace

    def refuses_the_new_one(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(13, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refuses_the_new_one)
    with pytest.raises(UserError, match="Permission denied"):
        write_folder(tmp_path / "folder", lambda temporary: None, replace=True)
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["folder"]


def test_the_disks_errors_are_told_from_others() -> None:
    full = as_os_error(Exception("Io(Os { code: 28 }): No space left on device (os error 28)"))
    assert isinstance(full, OSError)
    assert full.errno == 28
    other = ValueError("not of the disk")
    assert as_os_error(other) is other
