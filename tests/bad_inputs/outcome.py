"""What a row's command answers, in a copy of the kit."""

import io
import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import patch

from bad_inputs.row import Row
from peftlight.cli import main

_TELLS = "peftlight: error: "


def outcome(row: Row, folder: Path) -> tuple[int, str]:
    """The exit code, and all that stands on the error stream from the message on; the folder is the working folder."""
    for name, content in row.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    row.make()
    code, told = _in_a_process(row) if row.alone else _in_here(row)
    _, mark, message = told.rpartition(_TELLS)
    assert mark, f"{row.name}: no message of ours: {told}"
    return code, message.strip().replace(str(folder), "FOLDER")


def _in_here(row: Row) -> tuple[int, str]:
    told = io.StringIO()
    here = patch.dict(os.environ, row.environment)
    with redirect_stderr(told), redirect_stdout(io.StringIO()), here, _absent(row.without):
        return main(shlex.split(row.command)), told.getvalue()


@contextmanager
def _absent(names: Sequence[str]) -> Iterator[None]:
    """Importing these fails; modules that are imported meanwhile stay, unlike with `patch.dict`."""
    there = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    sys.modules.update(dict.fromkeys([*there, *names]))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(there)


def _in_a_process(row: Row) -> tuple[int, str]:
    command = [sys.executable, "-m", "peftlight", *shlex.split(row.command)]
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (row.largest_file,) * 2) if row.largest_file else None
    done = subprocess.run(command, env={**os.environ, **row.environment}, capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL, preexec_fn=full)  # fmt: skip
    return done.returncode, done.stderr


@contextmanager
def working_folder(kit: Path | None, folder: Path) -> Iterator[Path]:
    """A copy of the kit, or an empty folder, as the working folder; nothing of it stays in this process."""
    if kit is None:
        folder.mkdir()
    else:
        shutil.copytree(kit, folder, symlinks=True)
    path, here = list(sys.path), Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(here)
        sys.path[:] = path
