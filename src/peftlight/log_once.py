"""What a library logs again and again, at each layer and each batch, is said once."""

import logging


class Once(logging.Filter):
    """Lets each message through the first time that it comes, and any other message as ever."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[tuple[str, int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.name, record.levelno, record.getMessage()
        if message in self._said:
            return False
        self._said.add(message)
        return True


def log_once(library: str) -> None:
    """Let all loggers that the library has made say each message once; called again, it changes nothing."""
    for name in sorted(logging.root.manager.loggerDict):
        if name.partition(".")[0] == library:
            logger = logging.getLogger(name)
            if not any(isinstance(each, Once) for each in logger.filters):
                logger.addFilter(Once())
