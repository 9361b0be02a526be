"""The log format of all our processes. No text in a record can pass for a line of ours."""

from __future__ import annotations

import logging
import sys
import threading
from types import TracebackType

from ..broker.failures import shorten
from ..broker.process.printable import INDENT, printable_lines

logger = logging.getLogger(__name__)

MAX_BYTES = 64 * 1024  # per record
_FORM = "%(asctime)s [%(process)d] %(levelname)s %(name)s: %(message)s"


class LineFormatter(logging.Formatter):
    """Starts each record with the time, and no other line does: further lines (a traceback, a multi-line message) are indented.
    Unprintable characters are escaped. A record of more than 64 KiB loses its middle."""

    def __init__(self, *, dated: bool = False) -> None:
        super().__init__(_FORM, datefmt="%Y-%m-%d %H:%M:%S" if dated else "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        whole, characters = super().format(record), MAX_BYTES
        while True:
            text = printable_lines(shorten(whole, characters), INDENT)
            if len(text.encode()) <= MAX_BYTES:
                return text
            characters //= 2  # escapes and indentation make the text longer


def set_up(*, verbose: bool, dated: bool) -> None:
    """Configures logging for a process of ours: all records go to stderr in our format."""
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter(dated=dated))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # They log a lost connection as an error with a traceback, though we recover; at DEBUG they log payloads.
    for name in ("aio_pika", "aiormq"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)


def log_what_python_prints() -> None:
    """Logs uncaught exceptions and warnings, which may contain strangers' text too, in our format."""
    logging.captureWarnings(True)
    sys.excepthook = log_uncaught
    threading.excepthook = _log_of_thread
    sys.unraisablehook = _log_unraisable


def log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logger.critical("this process ends by an uncaught exception", exc_info=(kind, error, trace))


def _log_of_thread(said: threading.ExceptHookArgs) -> None:
    if said.exc_value is not None and not issubclass(said.exc_type, SystemExit):
        name = said.thread.name if said.thread is not None else "that is gone"
        logger.error("the thread %s ends by an uncaught exception", name, exc_info=said.exc_value)


def _log_unraisable(said: sys.UnraisableHookArgs) -> None:
    if said.exc_value is not None:
        logger.error("%s %r", said.err_msg or "an error was ignored in", said.object, exc_info=said.exc_value)
