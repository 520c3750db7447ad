"""What peftlight says to a person: on the terminal and, as plain text, in the run's log; on the first process only."""

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console, RenderableType

log = logging.getLogger("peftlight")
_LOGGERS = (
    "peftlight", "lightning", "lightning.pytorch", "lightning.fabric", "transformers", "bitsandbytes", "py.warnings",
)  # fmt: skip
_ALSO_SHOWN = ("peftlight", "bitsandbytes", "py.warnings")
"""Those that have no way to the terminal of their own once a log is open."""
_TERMINAL = logging.lastResort or logging.StreamHandler()


@rank_zero_only
def say(what: RenderableType) -> None:
    """Print text or a table, and write it to the run's log."""
    as_it_is: dict[str, Any] = {"markup": False, "emoji": False, "soft_wrap": isinstance(what, str)}
    Console(**as_it_is).print(what)
    plain = Console(file=io.StringIO(), width=120, **as_it_is)
    plain.print(what)
    text = plain.file.getvalue().rstrip()  # type: ignore[attr-defined]
    for handler in (each for each in log.handlers if isinstance(each, logging.FileHandler)):
        handler.emit(logging.LogRecord("peftlight", logging.INFO, "", 0, text, None, None))


class _RunLog(logging.FileHandler):
    """A log whose own failure ends no run: on a full disk, what else is written there says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing; Python would print where in the code it was, and for each line anew."""

    def close(self) -> None:
        """Leave out what could not be written until now."""
        with contextlib.suppress(OSError):
            super().close()


def write_log_to(path: Path) -> logging.Handler:
    """From now on write what peftlight, Lightning, transformers and bitsandbytes say, and all warnings, to `path`."""
    handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.captureWarnings(True)
    for name in _LOGGERS:
        if not _reaches(logging.getLogger(name), handler):
            logging.getLogger(name).addHandler(handler)
    for name in _ALSO_SHOWN:
        logging.getLogger(name).addHandler(_TERMINAL)
    return handler


def _reaches(logger: logging.Logger | None, handler: logging.Handler) -> bool:
    """Whether the handler already gets what the logger says, through one above it."""
    while logger is not None:
        if handler in logger.handlers:
            return True
        logger = logger.parent if logger.propagate else None
    return False


def stop_log(handler: logging.Handler) -> None:
    """Close what `write_log_to` opened."""
    logging.captureWarnings(False)
    for name in _LOGGERS:
        logging.getLogger(name).removeHandler(handler)
    for name in _ALSO_SHOWN:
        logging.getLogger(name).removeHandler(_TERMINAL)
    handler.close()
