"""What peftlight says to a person: on the terminal and, as plain text, in the run's log; on the first process only."""

import contextlib
import io
import logging
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console, RenderableType

log = logging.getLogger("peftlight")
_PACKAGES = ("peftlight", "lightning", "torch", "transformers", "datasets", "huggingface_hub", "bitsandbytes", "py")
"""Whose loggers are heard; the last one's hands on Python's warnings."""
_ALSO_SHOWN = ("peftlight", "py.warnings", "bitsandbytes")
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
    for handler in (each for each in log.handlers if isinstance(each, _RunLog | _Kept)):
        handler.emit(logging.LogRecord("peftlight", logging.INFO, "", 0, text, None, None))


class _RunLog(logging.FileHandler):
    """A log whose own failure ends no run: on a full disk, what else is written there says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing; Python would print where in the code it was, and for each line anew."""

    def close(self) -> None:
        """Leave out what could not be written until now."""
        with contextlib.suppress(OSError):
            super().close()


class _Kept(logging.Handler):
    """What was said before a run has its log; of very much, the last lines."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextlib.contextmanager
def kept_for_log() -> Iterator[None]:
    """Keep what peftlight and the libraries say, and all warnings, until `write_log_to` opens a log, which gets it."""
    kept = _Kept()
    _listen(kept)
    try:
        yield
    finally:
        stop_log(kept)


def write_log_to(path: Path) -> logging.Handler:
    """From now on write what peftlight and the libraries say, and all warnings, to `path`; first what was kept."""
    handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for kept in (each for each in log.handlers if isinstance(each, _Kept)):
        for record in kept.records:
            handler.handle(record)
        _forget(kept)
    _listen(handler)
    return handler


def stop_log(handler: logging.Handler) -> None:
    """Close what `write_log_to` opened."""
    logging.captureWarnings(False)
    _forget(handler)
    for name in _ALSO_SHOWN:
        logging.getLogger(name).removeHandler(_TERMINAL)
    handler.close()


def _listen(handler: logging.Handler) -> None:
    logging.captureWarnings(True)
    for logger in _loggers():
        if not _reaches(logger, handler):
            logger.addHandler(handler)
    for name in _ALSO_SHOWN:
        logging.getLogger(name).addHandler(_TERMINAL)


def _forget(handler: logging.Handler) -> None:
    for logger in _loggers():
        logger.removeHandler(handler)


def _loggers() -> list[logging.Logger]:
    """Those of the packages, parents first; some hand nothing on to theirs."""
    known = sorted({*_PACKAGES, *_ALSO_SHOWN, *logging.root.manager.loggerDict})
    return [logging.getLogger(name) for name in known if name.partition(".")[0] in _PACKAGES]


def _reaches(logger: logging.Logger | None, handler: logging.Handler) -> bool:
    """Whether the handler already gets what the logger says, through one above it."""
    while logger is not None:
        if handler in logger.handlers:
            return True
        logger = logger.parent if logger.propagate else None
    return False
