"""Rate-limited warnings: a failure that repeats every second is logged at once, and then once in a while."""

from __future__ import annotations

import logging
import math
import time

AGAIN_AFTER_S = 60.0


class Complaint:
    """The warnings about one operation that is retried. Call `over` after a success: the next failure is then logged at once."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._last, self._said_at = "", -math.inf

    def __repr__(self) -> str:
        return f"<Complaint {self._last!r}>"

    def say(self, words: str) -> None:
        """Logs `words` as a warning, unless the same words were logged within the last AGAIN_AFTER_S."""
        if words != self._last or time.monotonic() - self._said_at > AGAIN_AFTER_S:
            self._logger.warning("%s", words)
            self._last, self._said_at = words, time.monotonic()

    def over(self) -> None:
        self._last = ""
