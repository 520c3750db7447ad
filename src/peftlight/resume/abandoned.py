"""What a run had trained beyond the earlier checkpoint from which it goes on."""

import time
from collections.abc import Iterator
from pathlib import Path

from peftlight.checkpoint_files import read_checkpoint, written_after
from peftlight.console import say
from peftlight.errors import UserError, listed
from peftlight.resume.past import Past


def set_aside(past: Past) -> None:
    """Move the later checkpoints of the run to a folder beside them: its newest is now the one that was taken up."""
    if past.folder is None:
        return
    aside = past.checkpoint.parent / f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}"
    if later := list(_beyond(past)):
        aside.mkdir()
        for path in later:
            path.rename(aside / path.name)
        names = listed(path.name for path in later)
        say(f"The checkpoints that the run had beyond step {past.step} are set aside, in {aside}: {names}.")


def _beyond(past: Past) -> Iterator[Path]:
    for path in written_after(past.checkpoint):
        try:
            if read_checkpoint(path).get("global_step", 0) > past.step:
                yield path
        except UserError:  # damaged: nothing goes on from it
            continue
