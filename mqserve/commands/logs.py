"""The log lines of our processes: one form for all of them, in which nobody's text can pass for a line of ours."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType

from ..broker.failures import shorten
from ..broker.process.printable import INDENT, printable_lines

logger = logging.getLogger(__name__)

MAX_BYTES = 64 * 1024  # of one record
_FORM = "%(asctime)s [%(process)d] %(levelname)s %(name)s: %(message)s"


class LineFormatter(logging.Formatter):
    """Each record begins with the time at the beginning of a line, and nothing else does: what follows on further lines (a traceback, a
    message of several lines) is indented. What is not printable is escaped. A record of more than 64 KiB loses its middle."""

    def __init__(self, *, dated: bool = False) -> None:
        super().__init__(_FORM, datefmt="%Y-%m-%d %H:%M:%S" if dated else "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        whole, characters = super().format(record), MAX_BYTES
        while True:
            text = printable_lines(shorten(whole, characters), INDENT)
            if len(text.encode()) <= MAX_BYTES:
                return text
            characters //= 2  # escapes and indentation take more than what they stand for


def set_up(*, verbose: bool, dated: bool) -> None:
    """For a process of ours: whatever is logged in it is written to stderr in our form."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(dated=dated))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # Their records of a lost connection are errors with tracebacks, though we recover; at DEBUG they print payloads.
    for name in ("aio_pika", "aiormq"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def log_what_python_prints() -> None:
    """Exceptions that nothing catches, and warnings: they may hold anybody's words, too."""
    logging.captureWarnings(True)
    sys.excepthook = log_uncaught
    threading.excepthook = _log_of_thread
    sys.unraisablehook = _log_unraisable


def log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.critical("this process ends by an error that nothing caught", exc_info=(kind, error, trace))


def _log_of_thread(said: threading.ExceptHookArgs) -> None:
    if said.exc_value is not None and not issubclass(said.exc_type, SystemExit):
        name = said.thread.name if said.thread is not None else "that is gone"
        logger.error("the thread %s ends by an error that nothing caught", name, exc_info=said.exc_value)


def _log_unraisable(said: sys.UnraisableHookArgs) -> None:
    if said.exc_value is not None:
        logger.error("%s %r", said.err_msg or "an error was ignored in", said.object, exc_info=said.exc_value)
