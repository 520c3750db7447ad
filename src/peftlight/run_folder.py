"""The folder of a run: made or taken up again, held by one process at a time, and taken away where nothing was done."""

import shutil
import time
from pathlib import Path

from peftlight.errors import UserError
from peftlight.locks import Held, Lock

_PATIENCE = 8.0
"""Seconds; the workers that a killed process leaves behind look for it every five, and hold what it held until then."""
_LOCK = ".lock"
_OF_THE_START = {_LOCK, "config.yaml", "run.json", "log.txt"}


class RunFolder:
    """A run's folder while this process works in it."""

    def __init__(self, path: Path, new: bool = False) -> None:
        """
        Args:
            path: the folder, which is there.
            new: whether it was made for this process.

        Raises:
            UserError: another process works in it, or it cannot be written.
        """
        self.path, self.new = path, new
        self._lock = Lock(path / _LOCK, "A run needs a folder that can be written and locked; for new ones: "
                                        "--trainer.default_root_dir FOLDER")  # fmt: skip
        try:
            self._lock.take(_PATIENCE)
        except Held as holder:
            raise UserError(f"The run {path} goes on in another process ({holder}): wait for its end, or stop it first."
                            ) from None  # fmt: skip

    def leave(self, nothing_done: bool) -> None:
        """Let others work in it; a new folder in which nothing was done goes away with what a start writes."""
        if self.new and nothing_done and {one.name for one in self.path.glob("*")} <= _OF_THE_START:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.leave()


def new_run_folder(root: Path, name: str) -> RunFolder:
    """A folder under `root` that no other run has, called by the time and `name`.

    Raises:
        UserError: it cannot be made.
    """
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    number = 1
    while True:
        folder = root / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return RunFolder(folder, new=True)
        except OSError as error:
            if not (isinstance(error, FileExistsError) and root.is_dir()):  # as a link to a disk that is not there
                raise UserError(f"The run folder {folder} cannot be made: {error.strerror}. Set "
                                "--trainer.default_root_dir to a folder that can be written.") from error  # fmt: skip
            number += 1
